import { runCommand } from './command.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'

/** Whether one of QEMU's programs says that another one's locks keep it from an image. Names may have the word in them. */
export function saysLocked(stderr: string): boolean {
  return /Failed to (?:get (?:shared )?"[^"]+" )?lock/.test(stderr)
}

/**
 * Refuses a file that a virtual machine or another of QEMU's programs has open, be it only as a backing file. It
 * is opened for writing as raw bytes, and nothing is written: QEMU then tries the locks that tell of every other
 * user, which for a raw disk reading does not. No error where there is no file.
 *
 * @throws DISK_BUSY
 */
export async function assertUnused(path: string, run: RunOptions): Promise<void> {
  if (!(await statIfThere(path))) return
  await runCommand('qemu-io', ['-f', 'raw', '-c', 'quit', path], run).catch(error => {
    if (!isVarveError(error, 'COMMAND_FAILED') || !saysLocked(String(error.context.stderr))) throw error
    throw new VarveError(
      'DISK_BUSY',
      `${path} is in use by a virtual machine or another program. Stop that, or choose another target.`,
      { context: { path }, cause: error, retryable: true },
    )
  })
}
