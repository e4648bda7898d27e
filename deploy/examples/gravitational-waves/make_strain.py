"""Makes the data of the example: noisy whitened strain of a Virgo-like detector, and the signals hidden in it.

    python3 make_strain.py [SAMPLES [SEED]]        writes strain.npy and signal.npy, float32 [samples, 1, 512]

Each sample is half a second at 1024 Hz.

Noise: Gaussian, coloured by the fit to the design sensitivity of the first Virgo that LALSuite has as XLALSimNoisePSDVirgo,

    S_h(f) = 10.2e-46 / Hz * ((7.87 x)^-4.8 + 6 / (17 x) + 1 + x^2),    x = f / 500 Hz

Signal: the inspiral of two compact objects to leading order. With the chirp mass M (in seconds) and the time tau that is
left to the coalescence,

    f = (5 / (256 tau))^(3/8) M^(-5/8) / pi,    h ~ f^(2/3) cos(phase),    phase = 2 pi * integral of f

(P. C. Peters, J. Mathews, Phys. Rev. 131, 435 (1963)). Chirp masses are 12 to 35 suns, and the signal is scaled to an
optimal signal-to-noise ratio between 8 and 20 in this noise.

Both are whitened: divided by the square root of S_h between 30 and 480 Hz, so that the noise has unit variance per sample
before the band is cut.
"""
import sys

import numpy as np

RATE, LENGTH = 1024, 512
SOLAR_MASS = 4.925491e-6  # G M / c^3, seconds
LOW, HIGH = 30.0, 480.0
PADDED = 4 * LENGTH  # the ends of a whitened stretch are not used


def spectral_density(frequency):
    x = frequency / 500.0
    return 10.2e-46 * ((7.87 * x) ** -4.8 + 6.0 / 17.0 / x + 1.0 + x * x)


def whiten(strain):
    frequency = np.fft.rfftfreq(PADDED, 1 / RATE)
    filter_ = np.zeros_like(frequency)
    band = (frequency >= LOW) & (frequency <= HIGH)
    filter_[band] = 1 / np.sqrt(spectral_density(frequency[band]) * RATE / 2)
    return np.fft.irfft(np.fft.rfft(strain) * filter_, PADDED)


def noise(random):
    frequency = np.fft.rfftfreq(PADDED, 1 / RATE)
    frequency[0] = frequency[1]
    deviation = np.sqrt(spectral_density(frequency) * RATE * PADDED) / 2
    parts = random.standard_normal((2, frequency.size))
    return np.fft.irfft((parts[0] + 1j * parts[1]) * deviation, PADDED)


def inspiral(random):
    chirp_mass = random.uniform(12, 35) * SOLAR_MASS
    # Coalescence within the last half of the stretch that is kept.
    end = (PADDED - LENGTH) / 2 + random.uniform(0.5, 1.0) * LENGTH
    tau = (end - np.arange(PADDED)) / RATE
    alive = tau > 0
    frequency = np.zeros(PADDED)
    frequency[alive] = (5 / (256 * tau[alive])) ** 0.375 * chirp_mass ** -0.625 / np.pi
    alive &= (frequency > 15) & (frequency < 440)
    phase = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.cumsum(frequency * alive) / RATE
    return np.where(alive, np.where(alive, frequency, 1) ** (2 / 3) * np.cos(phase), 0.0)


def main():
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    random = np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    kept = slice((PADDED - LENGTH) // 2, (PADDED + LENGTH) // 2)
    strain = np.zeros((samples, 1, LENGTH), np.float32)
    signal = np.zeros((samples, 1, LENGTH), np.float32)
    for i in range(samples):
        clean = whiten(inspiral(random))[kept]
        clean *= random.uniform(8, 20) / np.sqrt(np.sum(clean ** 2))  # the optimal signal-to-noise ratio
        signal[i, 0] = clean
        strain[i, 0] = clean + whiten(noise(random))[kept]
    np.save("strain.npy", strain)
    np.save("signal.npy", signal)
    print(f"wrote {samples} samples; noise deviation {np.std(strain - signal):.3f}, signal {np.std(signal):.3f}")


if __name__ == "__main__":
    main()
