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
  ): Promise<string[]> {
    const domain = await this.#designation(instance, run)
    const mark = `varve-${randomBytes(8).toString('hex')}`
    const lines = commands.map(([command, ...args]) => [command, ...[domain, ...args].map(quote)].join(' '))
    // The exit code is that of the last command.
    const args = [[...lines, ...(noAnswer ? [''] : [])].join(`; echo ${mark}; `)]
    return this.#explained(args, async () => {
      const { stdout, stderr } = await this.#execute(run, args)
      const errors = [...stderr.matchAll(/^error: *(.*)/gm)].map(([, error = '']) => error)
      const said = errors.find(error => !noAnswer?.test(error))
      if (said !== undefined) {
        throw new VarveError('COMMAND_FAILED', `virsh failed: ${said}; put that right and try again`, {
          context: { command: 'virsh', args, stderr },
        })
      }
      return stdout.split(mark).slice(0, commands.length)
    })
  }

  /** Runs a command that is about no domain. @throws COMMAND_FAILED and the others of {@link runCommand} */
  run(run: VirshOptions, ...args: string[]): Promise<string> {
    return this.#explained(args, async () => (await this.#execute(run, args)).stdout)
  }

  #execute(run: VirshOptions, args: readonly string[]): Promise<CommandResult> {
    const label = `virsh ${/[\w-]+/.exec(args[0] ?? '')?.[0] ?? ''}`
    return runCommand('virsh', ['--connect', this.#uri, '--quiet', ...args], { ...run, label })
  }

  /** Turns what virsh says of the connection and of domains into errors that tell what to do. */
  async #explained<T>(args: readonly string[], work: () => Promise<T>): Promise<T> {
    try {
      return await work()
    } catch (error) {
      const stderr = isVarveError(error, 'COMMAND_FAILED') ? String(error.context.stderr) : ''
      if (/failed to get domain|Domain not found|no domain with matching/i.test(stderr)) {
        throw this.#notFound(/'(.*)'/.exec(stderr)?.[1] ?? '', error)
      }
      if (/failed to connect to the hypervisor/i.test(stderr)) {
        const said = stderr.trim().split('\n').at(-1)?.replace('error: ', '')
        throw new VarveError(
          'COMMAND_FAILED',
          `libvirt does not answer at ${this.#uri}: ${said}. See that libvirtd runs (systemctl status libvirtd) and that the URI is right.`,
          { context: { command: 'virsh', args, stderr, uri: this.#uri }, cause: error, retryable: true },
        )
      }
      throw error
    }
  }
}

/** A word of a line of commands: virsh reads quotes as a shell does. */
function quote(word: string): string {
  return `'${word.replaceAll("'", "'\\''")}'`
}
