/**
 * What went wrong, as a stable word:
 *
 * - `QCOW2_ARGUMENT`: the call asks for something that cannot be, such as a cluster size of 3000.
 * - `QCOW2_FRAGMENTED`: the disk has more runs than an image is planned with. Nothing is wrong with it.
 * - `QCOW2_INVALID`: the image contradicts itself or the format: it is damaged or forged.
 * - `QCOW2_UNSUPPORTED`: the image may be a fine one, but uses something that Varve never writes.
 */
export type Qcow2ErrorCode = 'QCOW2_ARGUMENT' | 'QCOW2_FRAGMENTED' | 'QCOW2_INVALID' | 'QCOW2_UNSUPPORTED'

/** Details of a {@link Qcow2Error}: sizes, offsets, names. */
export type Qcow2ErrorContext = Readonly<Record<string, string | number | undefined>>

/** The error of this package. Tell them apart by {@link Qcow2Error.code}. */
export class Qcow2Error extends Error {
  /** What went wrong, as a stable word. */
  readonly code: Qcow2ErrorCode
  /** Details: sizes, offsets, names. */
  readonly context: Qcow2ErrorContext

  /** Makes an error; `message` says what is wrong and with which value. */
  constructor(code: Qcow2ErrorCode, message: string, context: Qcow2ErrorContext = {}) {
    super(message)
    this.name = 'Qcow2Error'
    this.code = code
    this.context = context
  }
}
