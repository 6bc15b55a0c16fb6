import { randomBytes } from 'node:crypto'
import { mkdir, open, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { NetworkProxy } from '@varve/testkit'
import { openFtpTunnel, startRadosgw, startSshd, startVsftpd } from '@varve/testkit/lab'
import { execa } from 'execa'
import type { Figure, Setting } from './cases.ts'
import { median, type Run, runTask, timeCommand } from './measure.ts'
import type { RemoteAddress } from './remote.ts'

const MiB = 2 ** 20
/** Ceph's gateway gives replaced objects back hours later, and the lab's cluster is in memory: they must all fit. */
const DATA_BYTES = 64 * MiB
const ROUND_TRIPS_MS = [0, 10, 50]
/** What ssh2 manages with one packet at a time is little: less data tells its rate. */
const PLAIN_SFTP_BYTES = 16 * MiB

/** Where a server is reached. */
interface Place {
  readonly host: string
  readonly port: number
}

/** A server, and how each of those who are measured reaches it. */
interface Server extends AsyncDisposable {
  readonly name: string
  readonly place: Place
  /** The same server with a delay on the way, where there is a way. */
  readonly delayed?: { readonly place: Place; readonly proxy: NetworkProxy }
  address(place: Place): RemoteAddress
  /** The remote `bench:` of rclone, as the options of its type. */
  rclone(place: Place): Record<string, string>
  /** Where objects are, within rclone's remote. */
  readonly root: string
}

const LOOPBACK = '127.0.0.1'

/** A proxy in front of a port. */
async function delayedPort(port: number): Promise<{ place: Place; proxy: NetworkProxy }> {
  const proxy = await NetworkProxy.start({ port })
  return { place: { host: LOOPBACK, port: proxy.port }, proxy }
}

const obscure = async (password: string) =>
  (await execa('rclone', ['obscure', '-'], { input: password })).stdout

async function s3(): Promise<Server> {
  const gateway = await startRadosgw()
  const { accessKey, secretKey } = await gateway.createUser('bench')
  const keys = { access_key_id: accessKey, secret_access_key: secretKey }
  const place = { host: LOOPBACK, port: gateway.port }
  const endpointOf = ({ host, port }: Place) => `http://${host}:${port}`
  const rclone = (place: Place) => ({ type: 's3', provider: 'Ceph', endpoint: endpointOf(place), ...keys })
  await execa('rclone', ['mkdir', 'bench:varve'], { env: rcloneEnv(rclone(place)), extendEnv: false })
  const delayed = await delayedPort(gateway.port)
  return {
    name: 's3',
    place,
    delayed,
    address: place => ({
      type: 's3',
      options: { endpoint: endpointOf(place), bucket: 'varve', accessKey, secretKey },
    }),
    rclone,
    root: 'varve/',
    async [Symbol.asyncDispose]() {
      await delayed.proxy[Symbol.asyncDispose]()
      await gateway[Symbol.asyncDispose]()
    },
  }
}

async function sftp(): Promise<Server> {
  const server = await startSshd()
  const { username, password, port } = server
  const pass = await obscure(password)
  const delayed = await delayedPort(port)
  return {
    name: 'sftp',
    place: { host: LOOPBACK, port },
    delayed,
    address: place => ({ type: 'sftp', options: { ...place, username, password } }),
    rclone: ({ host, port }) => ({ type: 'sftp', host, port: String(port), user: username, pass }),
    root: '',
    async [Symbol.asyncDispose]() {
      await delayed.proxy[Symbol.asyncDispose]()
      await server[Symbol.asyncDispose]()
    },
  }
}

async function ftp(): Promise<Server> {
  const server = await startVsftpd()
  const { username, password, port } = server
  const pass = await obscure(password)
  const tunnel = await openFtpTunnel(server)
  return {
    name: 'ftp',
    place: { host: LOOPBACK, port },
    delayed: { place: { host: tunnel.host, port }, proxy: tunnel.proxy },
    address: place => ({ type: 'ftp', options: { ...place, username, password, tls: 'none' } }),
    rclone: ({ host, port }) => ({ type: 'ftp', host, port: String(port), user: username, pass }),
    root: '',
    async [Symbol.asyncDispose]() {
      await tunnel[Symbol.asyncDispose]()
      await server[Symbol.asyncDispose]()
    },
  }
}

/** The driver that runs rclone, on a server that another driver reaches by itself. */
async function rcloneOverSftp(): Promise<Server> {
  const server = await sftp()
  const rclone = (place: Place) => ({ ...server.rclone(place), shell_type: 'none' })
  return {
    ...server,
    name: 'rclone over sftp',
    address: place => byRclone(rclone(place)),
    rclone,
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  }
}

async function rcloneToFolder(folder: string): Promise<Server> {
  const path = join(folder, 'rclone')
  await mkdir(path)
  const rclone = () => ({ type: 'alias', remote: path })
  return {
    name: 'rclone to a folder',
    place: { host: LOOPBACK, port: 0 },
    address: () => byRclone(rclone()),
    rclone,
    root: '',
    [Symbol.asyncDispose]: () => rm(path, { recursive: true }),
  }
}

function variablesOf(remote: Record<string, string>): Record<string, string> {
  const variables = Object.entries(remote).map(([name, value]) => [
    `RCLONE_CONFIG_BENCH_${name.toUpperCase()}`,
    value,
  ])
  return Object.fromEntries(variables)
}

function rcloneEnv(remote: Record<string, string>): Record<string, string> {
  return { PATH: process.env.PATH ?? '', RCLONE_CONFIG: '/dev/null', ...variablesOf(remote) }
}

/** The driver that runs rclone, with a remote as of a configuration file: its password is obscured already. */
function byRclone(remote: Record<string, string>): RemoteAddress {
  const options = { remoteName: 'bench', configFile: '/dev/null', env: variablesOf(remote) }
  return { type: 'rclone', options }
}

const megabytes = (bytes: number, runs: readonly Run[]) => bytes / 1e6 / median(runs.map(run => run.seconds))
const rate = (value: number) => `${value.toFixed(1)} MB/s`

/** One row: Varve's time for each byte over the peer's. */
function row(
  name: string,
  own: { bytes: number; runs: Run[] },
  peer: { bytes: number; runs: Run[] },
  aim?: number,
): Figure {
  const rates = [megabytes(own.bytes, own.runs), megabytes(peer.bytes, peer.runs)] as const
  const value = rates[1] / rates[0]
  return {
    name,
    varve: rate(rates[0]),
    peer: rate(rates[1]),
    value: value.toFixed(2),
    aim: aim === undefined ? '' : `≤ ${aim}`,
    ...(aim !== undefined && { met: value <= aim }),
    runs: { own, peer },
  }
}

/** What the aims are, as ratios of the time for each byte. */
const AIMS: Readonly<Record<string, number>> = {
  's3 upload, 0 ms, against rclone': 0.8,
  'sftp upload, 50 ms, against rclone': 1.0,
  'sftp upload, 50 ms, against the library alone': 0.1,
}

async function measureServer(
  server: Server,
  { pairs }: Setting,
  file: string,
  bytes: number,
): Promise<Figure[]> {
  const figures: Figure[] = []
  const { name, delayed } = server
  let peak = 0
  let childPeak = 0
  const warmUp = { address: server.address(server.place), key: 'warm-up', file, bytes }
  await runTask('put', warmUp) // the gateway's first multipart upload makes a pool
  for (const roundTrip of delayed ? ROUND_TRIPS_MS : [0]) {
    if (delayed) delayed.proxy.latencyMs = roundTrip
    const place = delayed && roundTrip > 0 ? delayed.place : server.place
    const address = server.address(place)
    const env = rcloneEnv(server.rclone(place))
    const object = `bench:${server.root}by-rclone`
    const key = (pair: number) => `by-varve-${roundTrip}-${pair}` // a backup replaces no object
    const plainBytes = address.type === 'sftp' ? PLAIN_SFTP_BYTES : bytes
    const measures: Record<string, { bytes: number; run: (pair: number) => Promise<Run> }> = {
      'upload own': { bytes, run: pair => runTask('put', { address, key: key(pair), file, bytes }) },
      'upload rclone': {
        bytes,
        run: () => timeCommand('rclone', ['rcat', '--size', String(bytes), object], { env, inputFile: file }),
      },
      'download own': { bytes, run: pair => runTask('get', { address, key: key(pair) }) },
      'download rclone': { bytes, run: () => timeCommand('rclone', ['cat', object], { env }) },
      ...(address.type !== 'rclone' && {
        'upload library': {
          bytes: plainBytes,
          run: () => runTask('plain-put', { address, file, bytes: plainBytes }),
        },
      }),
    }
    const runs = new Map<string, Run[]>(Object.keys(measures).map(name => [name, []]))
    for (let pair = 0; pair < pairs; pair++) {
      for (const [name, { run }] of Object.entries(measures)) runs.get(name)?.push(await run(pair))
    }
    const of = (name: string) => ({ bytes: measures[name]?.bytes ?? 0, runs: runs.get(name) ?? [] })
    for (const { peakMiB = Number.NaN, childMiB = 0 } of [
      ...of('upload own').runs,
      ...of('download own').runs,
    ]) {
      peak = Math.max(peak, peakMiB)
      childPeak = Math.max(childPeak, childMiB)
    }
    const compare = (what: string, peer: string, peerName: string) => {
      const title = `${name} ${what}, ${roundTrip} ms, against ${peerName}`
      figures.push(row(title, of(`${what} own`), of(`${what} ${peer}`), AIMS[title]))
    }
    compare('upload', 'rclone', 'rclone')
    if ('upload library' in measures) compare('upload', 'library', 'the library alone')
    compare('download', 'rclone', 'rclone')
  }
  figures.push(memory(`${name}, peak memory of an upload or download`, peak, 250))
  if (childPeak > 0) figures.push(memory(`${name}, peak memory of its rclone`, childPeak))
  return figures
}

function memory(name: string, peakMiB: number, aim?: number): Figure {
  return {
    name,
    varve: `${peakMiB.toFixed(0)} MiB`,
    value: peakMiB.toFixed(0),
    aim: aim === undefined ? '' : `≤ ${aim} MiB`,
    ...(aim !== undefined && { met: peakMiB <= aim }),
    runs: [],
  }
}

/** Uploads to and downloads from a real server each, with a delay added on the way. */
export async function storage(setting: Setting): Promise<Figure[]> {
  const bytes = DATA_BYTES
  const file = join(setting.folder, 'data')
  await writeRandom(file, bytes)
  const figures: Figure[] = []
  for (const start of [s3, sftp, ftp, rcloneOverSftp, () => rcloneToFolder(setting.folder)]) {
    await using server = await start()
    figures.push(...(await measureServer(server, setting, file, bytes)))
  }
  return figures
}

async function writeRandom(path: string, bytes: number): Promise<void> {
  const handle = await open(path, 'w')
  for (let done = 0; done < bytes; done += 16 * MiB) await handle.write(randomBytes(16 * MiB))
  await handle.close()
}
