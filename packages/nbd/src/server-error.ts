import { NbdError } from './errors.ts'
import { COMMAND, ERRNO } from './protocol.ts'
import type { Request } from './request.ts'

/** A request for the context of an error. */
export function describeRequest(request: Request): { command: string; offset: number; length: number } {
  const { command, offset, length } = request
  const name = Object.entries(COMMAND).find(([, value]) => value === command)?.[0] ?? String(command)
  return { command: name, offset, length }
}

/** The `NBD_SERVER` of a request that the server answered with error `number`, and perhaps a text. */
export function serverError(request: Request, number: number, text = ''): NbdError {
  const errno = ERRNO[number] ?? 'EINVAL'
  const { command, offset, length } = describeRequest(request)
  const said = text ? ` (${text})` : ''
  return new NbdError(
    'NBD_SERVER',
    `The NBD server failed a ${command} of ${length} bytes at ${offset} with ${errno}${said}.`,
    { errno, context: { command, offset, length, errorNumber: number } },
  )
}
