import { text } from 'node:stream/consumers'
import { abortError, type CallOptions, isVarveError, type VarveError } from '@varve/core'
import { type FailedCommand, rcloneError } from './rclone-error.ts'
import type { RcloneHelperOptions } from './rclone-options.ts'
import { type RcloneExit, RcloneProcess } from './rclone-process.ts'
import { assertVersion, parseVersion } from './rclone-version.ts'
import { baseEnvironment, parseBackends, redact, remoteVariables, secretsOf } from './remote-environment.ts'

const DEFAULT_TIMEOUT_MS = 60_000

/** The programs that this process has found to be new enough. */
const newEnough = new Set<string>()

/** Options of {@link RcloneRunner.run}. */
export interface RunOptions extends CallOptions {
  /** Written to its standard input. */
  input?: string
  /** How long it may make no progress, in milliseconds. */
  idleMs?: number
  /** Without the remotes that are given in the options. */
  bare?: boolean
}

/** Starts rclones for one remote: with its environment and flags, and with errors that say what to do. */
export class RcloneRunner {
  /** How long an rclone may make no progress, in milliseconds. */
  readonly timeoutMs: number
  readonly #options: RcloneHelperOptions
  readonly #secrets: string[]
  /** The program, and where it is looked for. */
  readonly #program: string
  #env: Promise<Record<string, string>> | undefined

  constructor(options: RcloneHelperOptions) {
    this.#options = options
    this.timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS
    this.#secrets = secretsOf(options)
    this.#program = [options.command ?? 'rclone', baseEnvironment(options).PATH].join('\n')
  }

  /** Takes the secrets out of a text. */
  readonly redact = (text: string): string => redact(text, this.#secrets)

  /** The version. @throws COMMAND_MISSING; INVALID_CONFIG for an rclone that is too old */
  async version(options: CallOptions = {}): Promise<string> {
    const { exit, stdout } = await this.run(['version'], { ...options, bare: true })
    if (exit.exitCode !== 0) throw rcloneError(exit, { target: 'version' })
    const version = parseVersion(stdout)
    assertVersion(version)
    newEnough.add(this.#program)
    return version
  }

  /** Asks for the version unless this process has found the program to be new enough. @throws as {@link version} */
  async mustBeNewEnough(options: CallOptions): Promise<void> {
    if (!newEnough.has(this.#program)) await this.version(options)
  }

  /** Runs a command to its end, which must be a good one, and returns what it has printed. */
  async must(args: string[], target: string, options: CallOptions): Promise<string> {
    const { exit, stdout } = await this.run(args, options)
    if (exit.exitCode !== 0) throw await this.explain(exit, { target }, options)
    return stdout
  }

  /** Runs a command to its end, whatever that is. @throws ABORTED, TIMEOUT */
  async run(args: string[], options: RunOptions): Promise<{ exit: RcloneExit; stdout: string }> {
    const { input } = options
    const process = await this.start(args, options, input !== undefined)
    process.stdin?.end(input)
    const output = text(process.stdout).catch(() => '') // destroyed when it is stopped
    const exit = await process.exited
    if (process.stopped) throw process.stopped
    return { exit, stdout: await output }
  }

  /** Starts a command, with a pipe to its standard input or without. */
  async start(args: string[], options: RunOptions, input: boolean): Promise<RcloneProcess> {
    const { signal, onCommand, idleMs = this.timeoutMs, bare = false } = options
    if (signal?.aborted) throw abortError(signal)
    const env = bare ? baseEnvironment(this.#options) : await this.#environment(onCommand)
    return RcloneProcess.start([...args, ...this.#flags(args)], {
      command: this.#options.command ?? 'rclone',
      env,
      redact: this.redact,
      idleMs,
      input,
      listeners: [this.#options.onCommand, onCommand],
      signal,
    })
  }

  #flags(args: readonly string[]): string[] {
    const { remoteName, remotes = {}, configFile = remoteName in remotes ? '' : undefined } = this.#options
    const seconds = Math.ceil(this.timeoutMs / 1000)
    return [
      ...(configFile === undefined ? [] : ['--config', configFile]),
      ...['--retries', '1', '--low-level-retries', '3', '--contimeout', `${seconds}s`],
      ...(args.includes('--timeout') ? [] : ['--timeout', `${seconds}s`]),
      ...['--stats', '0', '--ask-password=false'],
    ]
  }

  /** The environment with the given remotes; made once, and told of to who needs it first. */
  #environment(onCommand: CallOptions['onCommand']): Promise<Record<string, string>> {
    this.#env ??= this.#makeEnvironment(onCommand ? { onCommand } : {}).catch(error => {
      this.#env = undefined
      throw error
    })
    return this.#env
  }

  async #makeEnvironment(call: CallOptions): Promise<Record<string, string>> {
    const env = baseEnvironment(this.#options)
    const { remotes = {} } = this.#options
    if (Object.keys(remotes).length === 0) return env
    const { exit, stdout } = await this.run(['config', 'providers'], { ...call, bare: true })
    if (exit.exitCode !== 0) throw await this.explain(exit, { target: 'providers' }, call)
    const variables = await remoteVariables(remotes, parseBackends(stdout), async password => {
      const { exit, stdout } = await this.run(['obscure', '-'], { ...call, bare: true, input: password })
      if (exit.exitCode !== 0) throw rcloneError(exit, { target: 'a password' })
      const obscured = stdout.trim()
      this.#secrets.push(password, obscured) // anyone can turn it back
      return obscured
    })
    return { ...env, ...variables }
  }

  /** The error of a command that failed; that of an rclone which is too old where that is the reason. */
  async explain(exit: RcloneExit, failed: FailedCommand, call: CallOptions): Promise<VarveError> {
    const error = rcloneError(exit, failed)
    if (newEnough.has(this.#program) || error.code === 'COMMAND_MISSING') return error
    try {
      await this.version(call)
      return error
    } catch (reason) {
      return isVarveError(reason, 'INVALID_CONFIG') ? reason : error
    }
  }
}
