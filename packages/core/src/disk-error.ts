import { NbdError } from '@varve/nbd'
import { Qcow2Error } from '@varve/qcow2'
import { VarveError } from './errors.ts'

/**
 * Errors of the NBD client and of the image composer as the SDK's own; any other error as it is.
 *
 * @returns NBD_FAILED, IMAGE_INVALID
 */
export function diskError(disk: string, error: unknown): unknown {
  if (!(error instanceof NbdError) && !(error instanceof Qcow2Error)) return error
  const code = error instanceof NbdError ? 'NBD_FAILED' : 'IMAGE_INVALID'
  const message = `The disk ${disk} could not be read: ${error.message} Look at what qemu-nbd said of it, and try again.`
  return new VarveError(code, message, { context: { disk, reason: error.code }, cause: error })
}
