#include "server/certificates.h"

#include <arpa/inet.h>
#include <openssl/bio.h>
#include <openssl/bn.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

// Ten years: the authority is made once per data directory, and its certificate is what clients hold.
constexpr int64_t kLifeDays = 3650;
constexpr absl::Duration kClockSkew = absl::Hours(24);

struct Free {
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
  void operator()(X509* p) const { X509_free(p); }
  void operator()(BIO* p) const { BIO_free_all(p); }
  void operator()(X509_EXTENSION* p) const { X509_EXTENSION_free(p); }
  void operator()(BIGNUM* p) const { BN_free(p); }
  void operator()(GENERAL_NAMES* p) const { GENERAL_NAMES_free(p); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

absl::Status OpenSslError(absl::string_view what) {
  char text[256] = "unknown error";
  if (const unsigned long code = ERR_get_error(); code != 0) ERR_error_string_n(code, text, sizeof text);
  ERR_clear_error();
  return absl::InternalError(absl::StrCat(what, ": ", text));
}

std::string Drain(BIO* bio) {
  char* bytes = nullptr;
  const long size = BIO_get_mem_data(bio, &bytes);
  return std::string(bytes, static_cast<size_t>(std::max(0L, size)));
}

absl::StatusOr<KeyAndCertificate> ToPem(EVP_PKEY* key, X509* certificate) {
  Owned<BIO> key_bio(BIO_new(BIO_s_mem())), certificate_bio(BIO_new(BIO_s_mem()));
  if (!PEM_write_bio_PrivateKey(key_bio.get(), key, nullptr, nullptr, 0, nullptr, nullptr) ||
      !PEM_write_bio_X509(certificate_bio.get(), certificate)) {
    return OpenSslError("writing a key");
  }
  return KeyAndCertificate{Drain(key_bio.get()), Drain(certificate_bio.get())};
}

Owned<X509> ParseCertificate(const std::string& pem) {
  Owned<BIO> bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  return Owned<X509>(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
}

Owned<EVP_PKEY> ParseKey(const std::string& pem) {
  Owned<BIO> bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  return Owned<EVP_PKEY>(PEM_read_bio_PrivateKey(bio.get(), nullptr, nullptr, nullptr));
}

bool AddExtension(X509* certificate, X509* issuer, int nid, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  Owned<X509_EXTENSION> extension(X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str()));
  return extension != nullptr && X509_add_ext(certificate, extension.get(), -1) == 1;
}

bool SetCommonName(X509* certificate, const std::string& name) {
  X509_NAME* subject = X509_get_subject_name(certificate);
  return X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_UTF8,
                                    reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0) == 1;
}

// Version, number, time and key; the caller names, extends and signs.
absl::StatusOr<Owned<X509>> NewCertificate(EVP_PKEY* key, absl::Time now) {
  Owned<X509> certificate(X509_new());
  Owned<BIGNUM> serial(BN_new());
  const std::time_t from = absl::ToTimeT(now - kClockSkew);
  const std::time_t to = absl::ToTimeT(now + absl::Hours(24 * kLifeDays));
  if (!certificate || !serial || !X509_set_version(certificate.get(), 2) ||
      !BN_rand(serial.get(), 127, BN_RAND_TOP_ONE, BN_RAND_BOTTOM_ANY) ||
      !BN_to_ASN1_INTEGER(serial.get(), X509_get_serialNumber(certificate.get())) ||
      !ASN1_TIME_set(X509_getm_notBefore(certificate.get()), from) ||
      !ASN1_TIME_set(X509_getm_notAfter(certificate.get()), to) || !X509_set_pubkey(certificate.get(), key)) {
    return OpenSslError("making a certificate");
  }
  return certificate;
}

bool IsAddress(const std::string& host) {
  unsigned char bytes[sizeof(in6_addr)];
  return inet_pton(AF_INET, host.c_str(), bytes) == 1 || inet_pton(AF_INET6, host.c_str(), bytes) == 1;
}

bool IsName(const std::string& host) {
  return !host.empty() && host.size() <= 253 && host.front() != '-' && host.front() != '.' &&
         std::all_of(host.begin(), host.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '.' ||
                  c == '_';
         });
}

}  // namespace

absl::StatusOr<KeyAndCertificate> MakeAuthority(const std::string& name, absl::Time now) {
  Owned<EVP_PKEY> key(EVP_EC_gen("P-256"));
  if (!key) return OpenSslError("making a key");
  ITWIN_ASSIGN_OR_RETURN(Owned<X509> certificate, NewCertificate(key.get(), now));
  if (!SetCommonName(certificate.get(), name) ||
      !X509_set_issuer_name(certificate.get(), X509_get_subject_name(certificate.get())) ||
      !AddExtension(certificate.get(), certificate.get(), NID_basic_constraints, "critical,CA:TRUE,pathlen:0") ||
      !AddExtension(certificate.get(), certificate.get(), NID_key_usage, "critical,keyCertSign,cRLSign") ||
      !AddExtension(certificate.get(), certificate.get(), NID_subject_key_identifier, "hash") ||
      !X509_sign(certificate.get(), key.get(), EVP_sha256())) {
    return OpenSslError("making an authority");
  }
  return ToPem(key.get(), certificate.get());
}

absl::StatusOr<KeyAndCertificate> IssueServerCertificate(const KeyAndCertificate& authority,
                                                         const std::vector<std::string>& hosts, absl::Time now) {
  if (hosts.empty()) return absl::InvalidArgumentError("a server certificate needs at least one host name");
  std::vector<std::string> names;
  for (const std::string& host : hosts) {
    if (IsAddress(host)) {
      names.push_back(absl::StrCat("IP:", host));
    } else if (IsName(host)) {
      names.push_back(absl::StrCat("DNS:", host));
    } else {
      return absl::InvalidArgumentError(absl::StrCat("'", host, "' is neither a host name nor an IP address"));
    }
  }
  const Owned<X509> issuer = ParseCertificate(authority.certificate_pem);
  const Owned<EVP_PKEY> issuer_key = ParseKey(authority.key_pem);
  if (!issuer || !issuer_key) return OpenSslError("reading the authority's key");
  Owned<EVP_PKEY> key(EVP_EC_gen("P-256"));
  if (!key) return OpenSslError("making a key");
  ITWIN_ASSIGN_OR_RETURN(Owned<X509> certificate, NewCertificate(key.get(), now));
  if (!SetCommonName(certificate.get(), "itwin-gateway") ||
      !X509_set_issuer_name(certificate.get(), X509_get_subject_name(issuer.get())) ||
      !AddExtension(certificate.get(), issuer.get(), NID_basic_constraints, "critical,CA:FALSE") ||
      !AddExtension(certificate.get(), issuer.get(), NID_key_usage, "critical,digitalSignature") ||
      !AddExtension(certificate.get(), issuer.get(), NID_ext_key_usage, "serverAuth") ||
      !AddExtension(certificate.get(), issuer.get(), NID_subject_alt_name, absl::StrJoin(names, ",")) ||
      !AddExtension(certificate.get(), issuer.get(), NID_authority_key_identifier, "keyid") ||
      !X509_sign(certificate.get(), issuer_key.get(), EVP_sha256())) {
    return OpenSslError("making a server certificate");
  }
  return ToPem(key.get(), certificate.get());
}

absl::StatusOr<CertificateFacts> ReadCertificate(const std::string& pem) {
  const Owned<X509> certificate = ParseCertificate(pem);
  ERR_clear_error();
  if (!certificate) return absl::DataLossError("not a certificate in PEM form");
  CertificateFacts facts;
  std::tm expires{};
  if (!ASN1_TIME_to_tm(X509_get0_notAfter(certificate.get()), &expires)) {
    return absl::DataLossError("the certificate has no date of expiry");
  }
  facts.expires = absl::FromTM(expires, absl::UTCTimeZone());
  Owned<GENERAL_NAMES> names(static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(certificate.get(), NID_subject_alt_name, nullptr, nullptr)));
  for (int i = 0; names && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names.get(), i);
    if (name->type == GEN_DNS) {
      facts.hosts.emplace_back(reinterpret_cast<const char*>(ASN1_STRING_get0_data(name->d.dNSName)),
                               static_cast<size_t>(ASN1_STRING_length(name->d.dNSName)));
    } else if (name->type == GEN_IPADD) {
      char text[INET6_ADDRSTRLEN] = "";
      const int length = ASN1_STRING_length(name->d.iPAddress);
      inet_ntop(length == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(name->d.iPAddress), text, sizeof text);
      facts.hosts.emplace_back(text);
    }
  }
  return facts;
}

}  // namespace itwin::server
