import type { z } from 'zod'
import { VarveError } from './errors.ts'

/** What a program has printed as JSON. @throws COMMAND_FAILED where it is something else */
export function parseOutput<T>(schema: z.ZodType<T>, text: string, command: string): T {
  try {
    return schema.parse(JSON.parse(text))
  } catch (error) {
    throw new VarveError(
      'COMMAND_FAILED',
      `What ${command} printed is not understood. See that the program in the PATH is QEMU's own, and which version it is.`,
      { context: { command, stdout: text.slice(0, 1000) }, cause: error },
    )
  }
}
