import { isAbsolute } from 'node:path'
import { type RbdConnection, VarveError } from '@varve/core'

/** Options of {@link CephConnector}: the cluster where a disk does not say which one. All come from Ceph's configuration by default. */
export interface CephOptions {
  /** The path of a ceph.conf; absolute. Default: where Ceph looks, which is `/etc/ceph/ceph.conf`. */
  conf?: string
  /** The cephx user, without `client.`. Default: `admin`. */
  user?: string
  /** The path of the user's keyring; absolute. Default: where Ceph looks, which is in `/etc/ceph`. */
  keyring?: string
  /**
   * The user's key itself, in base64, instead of a keyring. It reaches `rbd` through its environment, and QEMU's
   * programs through a file of their own that only they can read: it is on no command line.
   */
  key?: string
  /** The addresses of monitors, such as `10.0.0.1` or `10.0.0.1:6789`. Default: those of the ceph.conf. */
  monitors?: readonly string[]
  /**
   * How long the cluster may not answer a request, in milliseconds, before a command fails. Without a limit, `rbd`
   * waits for a cluster that is gone for ever. Default: 60,000.
   */
  timeoutMs?: number
}

/** One way to reach a cluster, checked. */
export interface CephConnection extends Readonly<Omit<CephOptions, 'timeoutMs'>> {
  readonly timeoutMs: number
}

const DEFAULT_TIMEOUT_MS = 60_000

/** Ceph's options that limit how long it waits (docs.ceph.com, "librados configuration"), in seconds. */
const TIMEOUTS = ['client_mount_timeout', 'rados_mon_op_timeout', 'rados_osd_op_timeout'] as const

/**
 * The connection that a disk names, completed by the options: another user's keyring or key is never taken, and a key
 * goes before a keyring.
 *
 * @throws INVALID_CONFIG, which names the field
 */
export function toConnection(options: CephOptions, named: RbdConnection = {}): CephConnection {
  const otherUser = named.user !== undefined && named.user !== options.user
  const own = otherUser || named.key !== undefined ? without(options, 'keyring', 'key') : options
  const connection = { timeoutMs: DEFAULT_TIMEOUT_MS, ...own, ...named }
  assertConnection(connection)
  return connection
}

/** The options that every program of Ceph takes. */
export function connectionArguments({ conf, user, keyring, monitors, timeoutMs }: CephConnection): string[] {
  return [
    ...(conf === undefined ? [] : [`--conf=${conf}`]),
    ...(monitors === undefined ? [] : [`--mon-host=${monitors.join(',')}`]),
    ...(user === undefined ? [] : [`--id=${user}`]),
    ...(keyring === undefined ? [] : [`--keyring=${keyring}`]),
    ...TIMEOUTS.map(name => `--${name.replaceAll('_', '-')}=${Math.ceil(timeoutMs / 1000)}`),
  ]
}

/** The variables of such a program's environment: options that come before those of its command line (ceph(8)). */
export function connectionEnvironment({ key }: CephConnection): Record<string, string> {
  return key === undefined ? {} : { CEPH_ARGS: `${process.env.CEPH_ARGS ?? ''} --key=${key}`.trim() }
}

/**
 * A file name of QEMU's rbd driver, which begins with `rbd:` and takes options of Ceph's after the image.
 *
 * @param keyring the path of the user's keyring
 */
export function qemuFileName(
  names: readonly string[],
  { conf, user, monitors, timeoutMs }: CephConnection,
  keyring: string | undefined,
): string {
  const options: Record<string, string | number | undefined> = {
    conf,
    id: user,
    keyring,
    mon_host: monitors?.join(','),
    ...Object.fromEntries(TIMEOUTS.map(name => [name, Math.ceil(timeoutMs / 1000)])),
  }
  const pairs = Object.entries(options).flatMap(([name, value]) =>
    value === undefined ? [] : [`:${name}=${escaped(String(value))}`],
  )
  return `rbd:${names.map(escaped).join('/')}${pairs.join('')}`
}

/** What QEMU would take for the end of a name or a value has a backslash before it. */
function escaped(text: string): string {
  return text.replace(/[\\/:@=]/g, '\\$&')
}

/** A keyring (ceph-authtool(8)). */
export function keyringText({ user = 'admin' }: CephConnection, key: string): string {
  return `[client.${user}]\n\tkey = ${key}\n`
}

function assertConnection(connection: CephConnection): void {
  const { conf, user, keyring, key, monitors, timeoutMs } = connection
  for (const [field, path] of Object.entries({ conf, keyring })) {
    if (path !== undefined && (!isAbsolute(path) || path.includes('\0')))
      throw invalid(field, path, 'It must be an absolute path')
  }
  if (user !== undefined && (!/^\w[\w.-]*$/.test(user) || user.startsWith('client.')))
    throw invalid('user', user, 'It is a cephx user without "client.", such as "varve"')
  if (key !== undefined && !isKey(key))
    throw invalid('key', '***', 'It must be a cephx key, as `ceph auth get-key client.NAME` prints it')
  if (key !== undefined && keyring !== undefined)
    throw invalid('key', '***', 'Give either a keyring or a key, not both')
  if (monitors !== undefined && (monitors.length === 0 || !monitors.every(isMonitor)))
    throw invalid('monitors', monitors.join(','), 'Each must be an address such as "10.0.0.1:6789"')
  if (!(Number.isFinite(timeoutMs) && timeoutMs > 0))
    throw invalid('timeoutMs', String(timeoutMs), 'It must be a number of milliseconds above 0')
}

/** Names, IPv4 and IPv6 addresses, with a port or not, and Ceph's own `[v2:…,v1:…]`. */
function isMonitor(monitor: string): boolean {
  return /^[\w.:[\],/-]+$/.test(monitor) && !monitor.startsWith('-')
}

/**
 * Whether this is a cephx key: le16 type, a time of 8 bytes, le16 length, and as many bytes. Ceph prints one that it
 * cannot read in its error.
 */
function isKey(text: string): boolean {
  if (!/^[A-Za-z0-9+/]+={0,2}$/.test(text)) return false
  const key = Buffer.from(text, 'base64')
  return key.length > 12 && key.readUInt16LE(10) === key.length - 12
}

function without(options: CephOptions, ...fields: (keyof CephOptions)[]): CephOptions {
  const rest = { ...options }
  for (const field of fields) delete rest[field]
  return rest
}

function invalid(field: string, value: string, rule: string): VarveError {
  return new VarveError(
    'INVALID_CONFIG',
    `${field} of a Ceph cluster cannot be ${JSON.stringify(value)}. ${rule}.`,
    { context: { field } },
  )
}
