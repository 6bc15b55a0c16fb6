import { isVarveError, type RunOptions, runCommand } from '@varve/core'
import { type CephConnection, connectionArguments, connectionEnvironment } from './connection.ts'
import { imageArguments, poolArguments } from './image-name.ts'
import { rbdError } from './rbd-error.ts'

/** How long a command may take that does the same for any image, in milliseconds. */
const SHORT_MS = 5 * 60_000
/** How long one may take that goes through all of an image; the cluster has its own limit for each step of it. */
const LONG_MS = 24 * 60 * 60_000

/** What a command is about. */
export interface RbdSubject {
  /** `<pool>/[<namespace>/]<image>` */
  readonly image: string
  readonly snapshot?: string
  /** Further arguments. */
  readonly more?: readonly string[]
  /** The image that may be in the way. Default: `image`. */
  readonly target?: string
  /** Whether it goes through all of the image. Default: false. */
  readonly isLong?: boolean
  /** Whether it is about the whole pool, or namespace, of the image. Default: false. */
  readonly isPool?: boolean
}

/** The `rbd` program on one connection, and its errors as the SDK's own. */
export class Rbd {
  readonly #connection: CephConnection

  constructor(connection: CephConnection) {
    this.#connection = connection
  }

  /** What a command prints in JSON; see {@link Rbd.run}. */
  async json(run: RunOptions, command: readonly string[], subject: RbdSubject): Promise<string> {
    return this.run(run, command, { ...subject, more: [...(subject.more ?? []), '--format=json'] })
  }

  /** Runs a command on an image. @throws those of {@link rbdError}, and those of a program that does not start or end */
  async run(run: RunOptions, command: readonly string[], subject: RbdSubject): Promise<string> {
    const { image, snapshot, more = [], target, isLong = false, isPool = false } = subject
    const label = ['rbd', ...command.filter(word => !word.startsWith('-'))].join(' ')
    const args = [
      ...command,
      ...(isPool ? poolArguments(image) : imageArguments(image, snapshot)),
      ...connectionArguments(this.#connection),
      ...more,
    ]
    const timeoutMs = isLong ? LONG_MS : SHORT_MS
    const env = { ...connectionEnvironment(this.#connection), TZ: 'UTC' } // times are compared as they are printed
    try {
      return (await runCommand('rbd', args, { ...run, label, timeoutMs, env })).stdout
    } catch (error) {
      if (!isVarveError(error, 'COMMAND_FAILED')) throw error
      const { exitCode, endedBy, stderr } = error.context
      throw rbdError({
        label,
        image,
        snapshot,
        target,
        exitCode: typeof exitCode === 'number' ? exitCode : undefined,
        endedBy: typeof endedBy === 'string' ? endedBy : undefined,
        stderr: String(stderr),
        cause: error,
      })
    }
  }
}
