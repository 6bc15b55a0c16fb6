import { resolve } from 'node:path'
import {
  type CallOptions,
  LibvirtHost,
  RBD_PREFIX,
  type RbdConnector,
  type RunOptions,
  type StorageDriver,
} from '@varve/core'
import { cephConnector } from './ceph-settings.ts'
import { type Config, loadConfig, openStorage } from './config.ts'
import { EXIT, type ExitCode } from './exit-code.ts'
import { printable } from './printable.ts'
import { ProgressView } from './progress-view.ts'
import { readSecret } from './secret.ts'
import type { Terminal } from './terminal.ts'
import { writeText } from './write-text.ts'

/** The options that every command has. */
export interface GlobalOptions {
  config?: string
  json?: boolean
  verbose?: boolean
}

/** One run of `varve`: what its command is given to work with. */
export class Session {
  readonly terminal: Terminal
  /** Aborted by Ctrl-C. */
  readonly signal: AbortSignal
  /** What the command ends with, unless it throws. */
  exitCode: ExitCode = EXIT.done
  #options: GlobalOptions = {}
  #config: Promise<Config> | undefined
  #view: ProgressView | undefined

  constructor(terminal: Terminal, signal: AbortSignal) {
    this.terminal = terminal
    this.signal = signal
  }

  /** The command line was understood; its command comes next. */
  begin(options: GlobalOptions): void {
    this.#options = options
  }

  /** Whether standard output is to be one JSON document. */
  get json(): boolean {
    return this.#options.json ?? false
  }

  /** Whether external commands and the causes of errors are shown. */
  get verbose(): boolean {
    return this.#options.verbose ?? false
  }

  /** The configuration. @throws INVALID_CONFIG */
  config(): Promise<Config> {
    const { env, cwd } = this.terminal
    this.#config ??= loadConfig({ path: this.#options.config, env, cwd })
    return this.#config
  }

  /** The storage of a name, or the only one. The caller disposes of it. @throws INVALID_ARGUMENT, INVALID_CONFIG */
  async openStorage(name: string | undefined): Promise<StorageDriver> {
    return openStorage(await this.config(), name, this.terminal.env)
  }

  /** The folder of the run journals. */
  async stateDir(option: string | undefined): Promise<string> {
    const { VARVE_STATE_DIR } = this.terminal.env
    return this.path(
      option ?? (VARVE_STATE_DIR || undefined) ?? (await this.config()).stateDir ?? '/var/lib/varve',
    )
  }

  /** libvirt's connection URI. */
  async libvirtUri(option: string | undefined): Promise<string> {
    const { VARVE_LIBVIRT_URI } = this.terminal.env
    return option ?? (VARVE_LIBVIRT_URI || undefined) ?? (await this.config()).libvirtUri ?? 'qemu:///system'
  }

  /** What reaches disks that are RBD images. @throws INVALID_CONFIG */
  async rbd(): Promise<RbdConnector> {
    const { path: configPath, ceph = {} } = await this.config()
    const { env } = this.terminal
    return cephConnector(ceph, key => readSecret(key, { configPath, field: 'ceph.key', env }))
  }

  /** The host of instances under libvirt, and of RBD images by their names. @throws INVALID_CONFIG */
  async libvirtHost(uri: string | undefined): Promise<LibvirtHost> {
    return new LibvirtHost({ uri: await this.libvirtUri(uri), rbd: await this.rbd() })
  }

  /**
   * A path of the command line as an absolute one: it may be written in a journal, and read from elsewhere. That of an
   * RBD image, `rbd:<pool>/<image>`, stays as it is.
   */
  path(path: string): string {
    return path.startsWith(RBD_PREFIX) ? path : resolve(this.terminal.cwd, path)
  }

  /** The signal, and the events shown on standard error. */
  run(): RunOptions & { signal: AbortSignal } {
    this.#view ??= new ProgressView(this.terminal.stderr, { verbose: this.verbose })
    const view = this.#view
    return { signal: this.signal, onEvent: event => view.update(event) }
  }

  /** The same for a call that is no run: the signal, and the programs that a storage runs. */
  call(): CallOptions & { signal: AbortSignal } {
    const { signal, onEvent } = this.run()
    return { signal, ...(onEvent && { onCommand: onEvent }) }
  }

  /** A line on standard error, which spares the progress that is shown there. */
  notice(text: string): void {
    if (this.#view) this.#view.line(text)
    else this.terminal.stderr.write(`${printable(text)}\n`)
  }

  /** The command's outcome on standard output: for programs or for people. */
  async result(document: object, text: string): Promise<void> {
    this.close()
    await writeText(this.terminal.stdout, this.json ? JSON.stringify(document, null, 2) : printable(text))
  }

  /** Ends the view of the progress. */
  close(): void {
    this.#view?.close()
    this.#view = undefined
  }
}
