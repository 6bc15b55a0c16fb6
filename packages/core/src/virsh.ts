import { randomBytes } from 'node:crypto'
import { type CommandOptions, type CommandResult, runCommand } from './command.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { RunOptions } from './run-options.ts'

/** What virsh takes for the UUID of a domain has this length, in bytes. */
const UUID_LENGTH = 36

/** Options of one command. */
export type VirshOptions = RunOptions & Pick<CommandOptions, 'timeoutMs' | 'secretOutput'>

/** Options of several questions. */
export type AskOptions = Omit<VirshOptions, 'secretOutput'> & {
  /** The errors that only leave the answer to a question empty. Default: none. */
  readonly noAnswer?: RegExp
}

/** What was said to several questions. */
export interface Replies {
  /** What was printed to each. */
  readonly answers: readonly string[]
  /** The errors, in the order in which they came. */
  readonly errors: readonly string[]
  /** Makes one of them an error of the SDK's. */
  readonly failure: (said: string) => VarveError
}

/** The `virsh` program on one connection: its domains by their names, and its errors as the SDK's own. */
export class Virsh {
  readonly #uri: string

  /** @param uri libvirt's connection URI */
  constructor(uri: string) {
    this.#uri = uri
  }

  /** Runs a command on a domain. @throws INSTANCE_NOT_FOUND */
  async onDomain(run: VirshOptions, instance: string, command: string, ...args: string[]): Promise<string> {
    return this.run(run, command, await this.#designation(instance, run), ...args)
  }

  /**
   * What stands for a domain on virsh's command line. It takes a number for the id of a running domain, then
   * text as long as a UUID for one, and only then for a name; a name that could be taken for something else is given
   * as the UUID of the domain that has it, which takes a start of the program more.
   */
  async #designation(instance: string, run: VirshOptions): Promise<string> {
    const isOption = !/^[a-z_\d]/i.test(instance) // or odd in another way
    const isId = /^\d+$/.test(instance)
    if (!isOption && !isId && Buffer.byteLength(instance) !== UUID_LENGTH) return instance
    const list = await this.run({ ...run, secretOutput: false }, 'list', '--all', '--uuid', '--name')
    const uuid = list
      .split('\n')
      .map(line => /^\s*([\da-f-]{36})\s(.*)$/.exec(line))
      .find(match => match?.[2]?.trim() === instance)?.[1]
    if (uuid === undefined) throw this.#notFound(instance)
    return uuid
  }

  #notFound(instance: string, cause?: unknown): VarveError {
    return new VarveError(
      'INSTANCE_NOT_FOUND',
      `libvirt (${this.#uri}) has no domain ${instance}. "virsh --connect ${this.#uri} list --all" shows those it has.`,
      { context: { instance, uri: this.#uri }, cause },
    )
  }

  /**
   * Asks several things about a domain with one start of the program, which takes longer than the answers do.
   * Returns what was printed to each, in the order in which they were asked, one after the other.
   *
   * @param commands such as `['dumpxml', '--inactive']`: the domain comes after the first word
   * @throws INSTANCE_NOT_FOUND
   */
  async ask(
    { noAnswer, ...run }: AskOptions,
    instance: string,
    ...commands: readonly (readonly string[])[]
  ): Promise<readonly string[]> {
    const { answers, errors, failure } = await this.tryAll(run, instance, ...commands)
    const said = errors.find(error => !noAnswer?.test(error))
    if (said !== undefined) throw failure(said)
    return answers
  }

  /** The same for whoever tells by all that was said of errors whether they are a failure. */
  async tryAll(
    run: Omit<AskOptions, 'noAnswer'>,
    instance: string,
    ...commands: readonly (readonly string[])[]
  ): Promise<Replies> {
    const domain = await this.#designation(instance, run)
    const mark = `varve-${randomBytes(8).toString('hex')}`
    const lines = commands.map(([command, ...args]) => [command, ...[domain, ...args].map(quote)].join(' '))
    // The exit code is that of the last command, and so tells nothing.
    const args = [lines.map(line => `${line}; echo ${mark}`).join('; ')]
    const { stdout, stderr } = await this.#execute(run, args)
    return {
      answers: stdout.split(mark).slice(0, commands.length),
      errors: [...stderr.matchAll(/^error: *(.*)/gm)].map(([, error = '']) => error),
      failure: said => {
        const context = { command: 'virsh', args, stderr }
        const message = `virsh failed: ${said}; put that right and try again`
        return this.#explained(args, new VarveError('COMMAND_FAILED', message, { context }))
      },
    }
  }

  /** Runs a command that is about no domain. @throws COMMAND_FAILED and the others of {@link runCommand} */
  async run(run: VirshOptions, ...args: string[]): Promise<string> {
    return (await this.#execute(run, args)).stdout
  }

  async #execute(run: VirshOptions, args: readonly string[]): Promise<CommandResult> {
    const label = `virsh ${/[\w-]+/.exec(args[0] ?? '')?.[0] ?? ''}`
    const options = ['--connect', this.#uri, '--quiet', ...args]
    return runCommand('virsh', options, { ...run, label }).catch(error => {
      throw this.#explained(args, error)
    })
  }

  /** What virsh says of the connection and of domains as errors that tell what to do. */
  #explained<E>(args: readonly string[], error: E): E | VarveError {
    const stderr = isVarveError(error, 'COMMAND_FAILED') ? String(error.context.stderr) : ''
    if (/failed to get domain|Domain not found|no domain with matching/i.test(stderr))
      return this.#notFound(/'(.*)'/.exec(stderr)?.[1] ?? '', error)
    if (!/failed to connect to the hypervisor/i.test(stderr)) return error
    const said = stderr.trim().split('\n').at(-1)?.replace('error: ', '')
    return new VarveError(
      'COMMAND_FAILED',
      `libvirt does not answer at ${this.#uri}: ${said}. See that libvirtd runs (systemctl status libvirtd) and that the URI is right.`,
      { context: { command: 'virsh', args, stderr, uri: this.#uri }, cause: error, retryable: true },
    )
  }
}

/** A word of a line of commands: virsh reads quotes as a shell does. */
function quote(word: string): string {
  return `'${word.replaceAll("'", "'\\''")}'`
}
