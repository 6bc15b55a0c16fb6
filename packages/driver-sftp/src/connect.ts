import { connect as connectSocket } from 'node:net'
import { errorMessage, isVarveError, VarveError } from '@varve/core'
import type { ConnectConfig, ServerHostKeyAlgorithm, SFTPWrapper } from 'ssh2'
import SftpClient from 'ssh2-sftp-client'
import { SftpConnection } from './connection.ts'
import { fingerprintOf, type HostKeyRule, keyTypeOf } from './host-key.ts'
import type { SftpSettings } from './sftp-options.ts'

/** How many keepalives may be without an answer: of one every quarter of the timeout, for ten timeouts. */
const KEEPALIVES = 40

/** In the order of preference. `ssh-rsa` signs with SHA-1: for servers that know nothing better. */
const HOST_KEY_ALGORITHMS: ServerHostKeyAlgorithm[] = [
  'ssh-ed25519',
  'ecdsa-sha2-nistp256',
  'ecdsa-sha2-nistp384',
  'ecdsa-sha2-nistp521',
  'rsa-sha2-512',
  'rsa-sha2-256',
  'ssh-rsa',
]

/**
 * Logs in to a server and opens an SFTP session.
 *
 * @throws STORAGE_UNREACHABLE, STORAGE_ACCESS_DENIED, STORAGE_FAILED where the server offers no SFTP
 */
export async function connect(
  settings: SftpSettings,
  rule: HostKeyRule | undefined,
): Promise<SftpConnection> {
  const { host, port, username, login, timeoutMs } = settings
  const { judge, types } = (await rule?.load()) ?? { judge: () => 'accepted' as const, types: [] }
  const progress: Progress = { step: 'reaching the server', fingerprint: '' }
  const socket = connectSocket({ host, port, noDelay: true })
  const client = new SftpClient('varve', { error: ignore, end: ignore, close: ignore })
  const deadline = setTimeout(() => {
    progress.cause ??= new Error(`no answer for ${timeoutMs / 1000} s`)
    socket.destroy()
  }, timeoutMs)
  const heard = (step: Progress['step']) => {
    progress.step = step
    deadline.refresh()
  }

  let connection: SftpConnection | undefined
  const onError = (error: Error) => {
    progress.cause ??= error
    connection?.onError(error)
  }
  socket.on('error', onError)
  client.on('error', onError)
  client.on('connect', () => heard('agreeing on keys'))
  client.on('handshake', () => heard('logging in'))
  client.on('ready', () => heard('opening the SFTP session'))
  client.on('keyboard-interactive', (...args: KeyboardInteractive) => {
    const [, , , prompts, answer] = args
    // a prompt that shows what is typed does not ask for a password
    answer(prompts.map(prompt => (prompt.echo ? '' : (login.password ?? ''))))
  })
  const config: ConnectConfig = {
    sock: socket,
    username,
    ...login,
    tryKeyboard: login.password !== undefined,
    readyTimeout: 0, // the deadline is ours
    keepaliveInterval: Math.ceil(timeoutMs / 4),
    // answers wait behind data that a slow network still carries; a silent server is the connection's own matter
    keepaliveCountMax: KEEPALIVES,
    algorithms: { serverHostKey: preferring(types) },
    hostVerifier: (key: Buffer) => {
      progress.fingerprint = fingerprintOf(key)
      const verdict = judge(key)
      if (verdict === 'accepted') return true
      progress.cause ??= hostKeyRefused(settings, key, verdict.refused)
      return false
    },
  }
  let sftp: SFTPWrapper
  try {
    sftp = await client.connect(config)
  } catch (error) {
    socket.destroy()
    throw connectError(progress.cause ?? error, progress, settings)
  } finally {
    clearTimeout(deadline)
  }
  connection = new SftpConnection({
    socket,
    sftp,
    fingerprint: progress.fingerprint,
    address: addressOf(settings),
    timeoutMs,
    end: () => void client.end().catch(ignore),
  })
  return connection
}

/** Such as `sftp://host:22`. */
export function addressOf({ host, port }: SftpSettings): string {
  return `sftp://${host.includes(':') ? `[${host}]` : host}:${port}`
}

interface Progress {
  step: 'reaching the server' | 'agreeing on keys' | 'logging in' | 'opening the SFTP session'
  fingerprint: string
  cause?: Error
}

type KeyboardInteractive = [
  name: string,
  instructions: string,
  language: string,
  prompts: { prompt: string; echo?: boolean }[],
  answer: (answers: string[]) => void,
]

/** For events and failures that {@link SftpConnection} learns of by the socket as well. */
function ignore(): undefined {
  return undefined
}

/** The types that are known of a host first, or it may show another of its keys. */
function preferring(types: readonly string[]): ServerHostKeyAlgorithm[] {
  const known = (algorithm: string) =>
    types.some(type => type === algorithm || (type === 'ssh-rsa' && algorithm.startsWith('rsa-sha2-')))
  return [...HOST_KEY_ALGORITHMS.filter(known), ...HOST_KEY_ALGORITHMS.filter(algorithm => !known(algorithm))]
}

function hostKeyRefused(settings: SftpSettings, key: Buffer, why: string): VarveError {
  const address = addressOf(settings)
  const seen = `${keyTypeOf(key)} ${fingerprintOf(key)}`
  return new VarveError(
    'STORAGE_ACCESS_DENIED',
    `The server at ${address} is not the one that is expected: its host key is ${seen}, ${why}. Nothing was sent to it. If the server was installed anew, accept its new key; else find out who answers there.`,
    { context: { address, fingerprint: fingerprintOf(key) } },
  )
}

function connectError(cause: unknown, { step }: Progress, settings: SftpSettings): VarveError {
  if (isVarveError(cause)) return cause
  const address = addressOf(settings)
  const { username } = settings
  const level = property(cause, 'level')
  const code = property(cause, 'code')
  if (level === 'client-authentication' || level === 'agent') {
    return new VarveError(
      'STORAGE_ACCESS_DENIED',
      `The server at ${address} refused the login of ${username}: ${errorMessage(cause)}. Check the username, the password or the key.`,
      { context: { address, username }, cause },
    )
  }
  if (level === 'handshake') {
    return new VarveError(
      'STORAGE_UNREACHABLE',
      `The server at ${address} and this client found no common ground: ${errorMessage(cause)}. Allow current algorithms on the server, such as curve25519-sha256, ssh-ed25519 and aes128-gcm@openssh.com.`,
      { context: { address }, cause },
    )
  }
  if (
    step === 'opening the SFTP session' &&
    code === undefined &&
    /subsystem|channel|packet/i.test(errorMessage(cause))
  ) {
    return new VarveError(
      'STORAGE_FAILED',
      `The server at ${address} let ${username} in but opened no SFTP session: ${errorMessage(cause)}. Enable SFTP on the server; a login script that prints something breaks it too.`,
      { context: { address, username }, cause },
    )
  }
  return new VarveError(
    'STORAGE_UNREACHABLE',
    `${address} cannot be reached: ${unreachable(cause, step, settings)}`,
    {
      context: { address, step },
      cause,
      retryable: true,
    },
  )
}

function unreachable(cause: unknown, step: Progress['step'], { host, port }: SftpSettings): string {
  switch (property(cause, 'code')) {
    case 'ENOTFOUND':
    case 'EAI_AGAIN':
      return `the host ${host} is not known. Check the name and the DNS.`
    case 'ECONNREFUSED':
      return `nothing accepts connections on port ${port}. Check the port, and that the server runs.`
    case 'ENETUNREACH':
    case 'EHOSTUNREACH':
      return `there is no route to ${host}. Check the network.`
    default:
      return `${errorMessage(cause)} (while ${step}). Check the server, the network and a firewall.`
  }
}

function property(error: unknown, name: string): unknown {
  return error instanceof Error ? Reflect.get(error, name) : undefined
}
