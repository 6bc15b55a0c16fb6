import { randomBytes } from 'node:crypto'
import { mkdir, open, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { NetworkProxy } from '@varve/testkit'
import { startRadosgw, startSshd, startVsftpd } from '@varve/testkit/lab'
import { execa } from 'execa'
import type { Figure, Setting } from './cases.ts'
import { median, type Run, runTask, timeCommand } from './measure.ts'
import type { RemoteAddress } from './remote.ts'

const MiB = 2 ** 20
/** Ceph's gateway gives replaced objects back hours later, and the lab's cluster is in memory: they must all fit. */
const DATA_BYTES = 64 * MiB
const ROUND_TRIPS_MS = [0, 10, 50]
/** What ssh2 and basic-ftp manage with one packet or one connection is little: less data tells their rate. */
const PLAIN_BYTES = 16 * MiB

/** A server, and how each of those who are measured reaches it on a port. */
interface Server extends AsyncDisposable {
  readonly type: RemoteAddress['type']
  readonly port: number
  address(port: number): RemoteAddress
  /** The remote `bench:` of rclone, as the options of its type. */
  rclone(port: number): Record<string, string>
  /** Where objects are, within rclone's remote. */
  readonly root: string
}

async function s3(): Promise<Server> {
  const gateway = await startRadosgw()
  const { accessKey, secretKey } = await gateway.createUser('bench')
  const keys = { access_key_id: accessKey, secret_access_key: secretKey }
  const rclone = (port: number) => ({
    type: 's3',
    provider: 'Ceph',
    endpoint: `http://127.0.0.1:${port}`,
    ...keys,
  })
  await execa('rclone', ['mkdir', 'bench:varve'], { env: rcloneEnv(rclone(gateway.port)), extendEnv: false })
  return {
    type: 's3',
    port: gateway.port,
    address: port => ({
      type: 's3',
      options: { endpoint: `http://127.0.0.1:${port}`, bucket: 'varve', accessKey, secretKey },
    }),
    rclone,
    root: 'varve/',
    [Symbol.asyncDispose]: () => gateway[Symbol.asyncDispose](),
  }
}

async function sftp(): Promise<Server> {
  const server = await startSshd()
  const { username, password } = server
  const { stdout: pass } = await execa('rclone', ['obscure', password])
  return {
    type: 'sftp',
    port: server.port,
    address: port => ({ type: 'sftp', options: { host: '127.0.0.1', port, username, password } }),
    rclone: port => ({ type: 'sftp', host: '127.0.0.1', port: String(port), user: username, pass }),
    root: '',
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  }
}

async function ftp(): Promise<Server> {
  const server = await startVsftpd()
  const { username, password } = server
  const { stdout: pass } = await execa('rclone', ['obscure', password])
  return {
    type: 'ftp',
    port: server.port,
    address: port => ({
      type: 'ftp',
      options: { host: '127.0.0.1', port, username, password, tls: 'none' },
    }),
    rclone: port => ({ type: 'ftp', host: '127.0.0.1', port: String(port), user: username, pass }),
    root: '',
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  }
}

function rcloneEnv(remote: Record<string, string>): Record<string, string> {
  const variables = Object.entries(remote).map(([name, value]) => [
    `RCLONE_CONFIG_BENCH_${name.toUpperCase()}`,
    value,
  ])
  return {
    PATH: process.env.PATH ?? '',
    RCLONE_CONFIG: '/dev/null',
    ...Object.fromEntries(variables),
  }
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
  setting: Setting,
  file: string,
  bytes: number,
): Promise<Figure[]> {
  const figures: Figure[] = []
  let peak = 0
  await using proxy = await NetworkProxy.start({ port: server.port })
  await runTask('put', { address: server.address(server.port), file, bytes }) // its first multipart upload makes a pool
  // A data connection of FTP does not pass the proxy.
  for (const roundTrip of server.type === 'ftp' ? [0] : ROUND_TRIPS_MS) {
    proxy.latencyMs = roundTrip
    const port = roundTrip === 0 ? server.port : proxy.port
    const address = server.address(port)
    const env = rcloneEnv(server.rclone(port))
    const object = `bench:${server.root}by-rclone`
    const measures: Record<string, { bytes: number; run: () => Promise<Run> }> = {
      'upload own': { bytes, run: () => runTask('put', { address, file, bytes }) },
      'upload rclone': {
        bytes,
        run: () => timeCommand('rclone', ['rcat', '--size', String(bytes), object], { env, inputFile: file }),
      },
      'upload library': {
        bytes: PLAIN_BYTES,
        run: () => runTask('plain-put', { address, file, bytes: PLAIN_BYTES }),
      },
      'download own': { bytes, run: () => runTask('get', { address }) },
      'download rclone': { bytes, run: () => timeCommand('rclone', ['cat', object], { env }) },
    }
    const runs = new Map<string, Run[]>(Object.keys(measures).map(name => [name, []]))
    for (let pair = 0; pair < setting.pairs; pair++) {
      for (const [name, { run }] of Object.entries(measures)) runs.get(name)?.push(await run())
    }
    const of = (name: string) => ({ bytes: measures[name]?.bytes ?? 0, runs: runs.get(name) ?? [] })
    for (const run of [...of('upload own').runs, ...of('download own').runs])
      peak = Math.max(peak, run.peakMiB ?? Number.NaN)
    const compare = (what: string, peer: string, name: string) => {
      const title = `${server.type} ${what}, ${roundTrip} ms, against ${name}`
      figures.push(row(title, of(`${what} own`), of(`${what} ${peer}`), AIMS[title]))
    }
    compare('upload', 'rclone', 'rclone')
    compare('upload', 'library', 'the library alone')
    compare('download', 'rclone', 'rclone')
  }
  figures.push({
    name: `${server.type}, peak memory of an upload or download`,
    varve: `${peak.toFixed(0)} MiB`,
    value: peak.toFixed(0),
    aim: '≤ 250 MiB',
    met: peak <= 250,
    runs: [],
  })
  return figures
}

/** Uploads to and downloads from a real server each, with a delay added on the way. */
export async function storage(setting: Setting): Promise<Figure[]> {
  const bytes = DATA_BYTES
  const file = join(setting.folder, 'data')
  await writeRandom(file, bytes)
  const figures: Figure[] = []
  for (const start of [s3, sftp, ftp]) {
    await using server = await start()
    figures.push(...(await measureServer(server, setting, file, bytes)))
  }
  figures.push(...(await throughRclone(setting, file, bytes)))
  return figures
}

/** The driver that runs rclone, beside rclone. */
async function throughRclone({ folder, pairs }: Setting, file: string, bytes: number): Promise<Figure[]> {
  const path = join(folder, 'rclone')
  await mkdir(path)
  const address: RemoteAddress = {
    type: 'rclone',
    options: { remoteName: 'bench', remotes: { bench: { type: 'alias', remote: path } } },
  }
  const env = rcloneEnv({ type: 'alias', remote: path })
  const own: Run[] = []
  const peer: Run[] = []
  for (let pair = 0; pair < pairs; pair++) {
    own.push(await runTask('put', { address, file, bytes }))
    peer.push(
      await timeCommand('rclone', ['rcat', '--size', String(bytes), 'bench:by-rclone'], {
        env,
        inputFile: file,
      }),
    )
  }
  await rm(path, { recursive: true })
  return [row('rclone upload to a folder, against rclone', { bytes, runs: own }, { bytes, runs: peer })]
}

async function writeRandom(path: string, bytes: number): Promise<void> {
  const handle = await open(path, 'w')
  for (let done = 0; done < bytes; done += 16 * MiB) await handle.write(randomBytes(16 * MiB))
  await handle.close()
}
