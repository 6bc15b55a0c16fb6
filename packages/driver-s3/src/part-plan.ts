import { MAX_OBJECT_SIZE, MAX_PART_SIZE, MIN_PART_SIZE, type S3Settings } from './s3-options.ts'

const MIB = 1024 * 1024
/** The first part of a stream of unknown size, in bytes. */
const FIRST_PART_SIZE = 8 * MIB
/** The least size of the parts of a stream of unknown size where all are to be of one size, in bytes. */
const EQUAL_PART_SIZE = 32 * MIB
/** The largest part of a stream, in bytes, unless `partSize` is larger. */
const LARGEST_BUFFERED_PART = 96 * MIB
const BUFFER_SIZE = 64 * MIB

/** What a plan is made for. */
export type PartLimits = Pick<S3Settings, 'partSize' | 'maxParts' | 'equalParts'>

/** The largest object that fits into `maxParts` parts, in bytes. */
export function largestObject({ maxParts }: Pick<PartLimits, 'maxParts'>): number {
  return Math.min(MAX_OBJECT_SIZE, maxParts * MAX_PART_SIZE)
}

/**
 * The size of the parts of an object of `size` bytes, which is at most {@link largestObject}: `least`, or as
 * much more as keeps to `maxParts`. All parts but the last are of this size.
 */
export function plannedPartSize(
  size: number,
  { maxParts }: Pick<PartLimits, 'maxParts'>,
  least: number,
): number {
  const needed = Math.ceil(size / maxParts / MIB) * MIB
  return Math.min(MAX_PART_SIZE, Math.max(MIN_PART_SIZE, least, needed))
}

/** The largest part of a stream, in bytes: it has to be in memory to be sent, and sent again. */
export function largestBufferedPart({ partSize }: Pick<PartLimits, 'partSize'>): number {
  return Math.max(LARGEST_BUFFERED_PART, partSize)
}

/**
 * The size of the parts of a stream, the part of this number (from 1 on) among them, which ends at
 * {@link largestBufferedPart}. Where the size of the stream is unknown, small streams get small parts, and large
 * ones still fit: it doubles each time that a twentieth of the parts is used.
 */
export function streamPartSize(number: number, limits: PartLimits, size: number | undefined): number {
  if (size !== undefined) return plannedPartSize(size, limits, FIRST_PART_SIZE)
  if (limits.equalParts) return Math.max(EQUAL_PART_SIZE, limits.partSize)
  const doublings = Math.floor(((number - 1) * 20) / limits.maxParts)
  return doublings > 3 ? largestBufferedPart(limits) : FIRST_PART_SIZE * 2 ** doublings
}

/** What the parts of one stream may take of memory together, in bytes, the largest of them being of `partSize`. */
export function memoryOfParts(partSize: number): number {
  return Math.max(BUFFER_SIZE, partSize)
}

/** The largest stream that {@link streamPartSize} has parts for, in bytes. */
export function largestStream(limits: PartLimits, size: number | undefined): number {
  if (size !== undefined) return limits.maxParts * largestBufferedPart(limits)
  let bytes = 0
  for (let number = 1; number <= limits.maxParts; number++) bytes += streamPartSize(number, limits, size)
  return bytes
}
