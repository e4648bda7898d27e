#pragma once

#include "itwin/v1/jobs.pb.h"
#include "server/store/job_rows.h"

// Rows of the store as the messages that clients see. Pure.
namespace itwin::server {

v1::Job ToProto(const JobRow& row);  // without spec and attempts
v1::Attempt ToProto(const AttemptRow& row);
v1::JobEvent ToProto(const StoredEvent& event);

}  // namespace itwin::server
