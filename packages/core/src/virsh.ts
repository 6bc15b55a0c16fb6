import { type CommandOptions, runCommand } from './command.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { RunOptions } from './run-options.ts'

/** Options of one command. */
export type VirshOptions = RunOptions & Pick<CommandOptions, 'timeoutMs' | 'secretOutput'>

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
   * text for a UUID, and only then for a name; a name that could be taken for something else is given as the
   * UUID of the domain that has it.
   */
  async #designation(instance: string, run: VirshOptions): Promise<string> {
    if (/^[a-z_]/i.test(instance) && !/^[\da-f-]+$/i.test(instance)) return instance
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

  /** Runs a command that is about no domain. @throws COMMAND_FAILED and the others of {@link runCommand} */
  async run(run: VirshOptions, ...args: string[]): Promise<string> {
    try {
      const options = { ...run, label: `virsh ${args[0]}` }
      return (await runCommand('virsh', ['--connect', this.#uri, '--quiet', ...args], options)).stdout
    } catch (error) {
      const stderr = isVarveError(error, 'COMMAND_FAILED') ? String(error.context.stderr) : ''
      if (/failed to get domain|Domain not found|no domain with matching/i.test(stderr)) {
        throw this.#notFound(args.find(arg => stderr.includes(`'${arg}'`)) ?? '', error)
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
