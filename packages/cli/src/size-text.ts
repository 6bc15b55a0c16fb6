import { InvalidArgumentError } from 'commander'

const UNITS = ['KiB', 'MiB', 'GiB', 'TiB', 'PiB'] as const

/** A number of bytes for people, such as `3.0 GiB`: powers of 1024, one decimal below 100. */
export function formatSize(bytes: number): string {
  let value = bytes
  let unit = 'B'
  for (const next of UNITS) {
    // 1023.95 KiB would be printed as 1024 KiB
    if (Math.round(value) < 1024) break
    value /= 1024
    unit = next
  }
  return `${value < 99.95 && unit !== 'B' ? value.toFixed(1) : value.toFixed(0)} ${unit}`
}

/**
 * Bytes from an option such as `50M`: a number, then nothing, `K`, `M`, `G` or `T`, which stand for powers of
 * 1024 and may be followed by `iB`.
 */
export function parseSize(text: string): number {
  const [, digits = '', unit = ''] = /^(\d+(?:\.\d+)?)(?:([KMGT])(?:iB)?|B)?$/i.exec(text) ?? []
  const bytes = Number(digits) * 1024 ** ('KMGT'.indexOf(unit.toUpperCase()) + (unit === '' ? 0 : 1))
  if (digits === '' || !Number.isSafeInteger(Math.round(bytes)) || Math.round(bytes) < 1)
    throw new InvalidArgumentError('It is no size: give bytes, or a number with K, M, G or T, such as 50M.')
  return Math.round(bytes)
}

/** A rate for people, such as `350 MiB/s`. */
export function formatRate(bytesPerSecond: number): string {
  return `${formatSize(bytesPerSecond)}/s`
}
