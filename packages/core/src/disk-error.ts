import { NbdError } from '@varve/nbd'
import { Qcow2Error } from '@varve/qcow2'
import { type ErrorCode, VarveError } from './errors.ts'

/**
 * Errors of the NBD client and of the image composer as the SDK's own; any other error as it is.
 *
 * @returns NBD_FAILED; DISK_TOO_FRAGMENTED; INVALID_ARGUMENT for a disk that does not fit an image of the chosen cluster size; IMAGE_INVALID
 */
export function diskError(disk: string, error: unknown): unknown {
  if (
    (error instanceof NbdError && error.code === 'NBD_FRAGMENTED') ||
    (error instanceof Qcow2Error && error.code === 'QCOW2_FRAGMENTED')
  ) {
    const remedy = 'Back it up with a larger clusterSize (--cluster-size), up to 2 MiB.'
    return failure(
      'DISK_TOO_FRAGMENTED',
      `The disk ${disk} is too fragmented. ${error.message} ${remedy}`,
      disk,
      error,
    )
  }
  if (error instanceof NbdError) {
    const remedy = 'Look at what qemu-nbd said of it, and try again.'
    return failure(
      'NBD_FAILED',
      `The disk ${disk} could not be read: ${error.message} ${remedy}`,
      disk,
      error,
    )
  }
  if (error instanceof Qcow2Error) {
    const code = error.code === 'QCOW2_ARGUMENT' ? 'INVALID_ARGUMENT' : 'IMAGE_INVALID'
    return failure(code, `No image of the disk ${disk} can be made: ${error.message}`, disk, error)
  }
  return error
}

function failure(code: ErrorCode, message: string, disk: string, error: NbdError | Qcow2Error): VarveError {
  return new VarveError(code, message, { context: { disk, reason: error.code }, cause: error })
}
