import { randomUUID } from 'node:crypto'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import { CephClient } from './ceph-client.ts'
import { freePorts, LabDaemon } from './lab-daemon.ts'

const START_TIMEOUT_MS = 60_000

/** Options of {@link startCeph}. */
export interface CephOptions {
  /** What the cluster has room for, in bytes; it is kept in memory. Default: 4 GiB. */
  capacity?: number
}

/** A cephx user of the lab's cluster. */
export interface CephUser {
  /** Its name without `client.`. */
  readonly user: string
  /** The path of its keyring. */
  readonly keyring: string
  /** Its key, in base64. */
  readonly secret: string
}

/**
 * A Ceph cluster of one monitor and one OSD on the loopback address, all of it in memory and in a temporary
 * folder. Disposing of it ends it and removes its files. Pools have one replica and 8 placement groups.
 */
export class CephLab implements AsyncDisposable {
  /** The path of its ceph.conf, for `ceph --conf`, `rbd --conf` and other clients; it names the keyring too. */
  readonly conf: string
  /** The folder of its files. */
  readonly folder: string
  readonly #daemons: LabDaemon[] = []
  #monitor = ''
  #client: CephClient | undefined

  /** @internal */
  constructor(folder: string) {
    this.folder = folder
    this.conf = join(folder, 'ceph.conf')
  }

  /** Runs a program of Ceph as the cluster's administrator and gives its standard output. */
  async run(program: string, ...args: string[]): Promise<string> {
    const { stdout } = await execa(program, ['--conf', this.conf, ...args], { timeout: START_TIMEOUT_MS })
    return stdout
  }

  /** The address of the monitor, for clients without the ceph.conf. */
  get monitor(): string {
    return this.#monitor
  }

  /** A client that stays, as the administrator. */
  get client(): CephClient {
    this.#client ??= new CephClient(this.conf, this.folder)
    return this.#client
  }

  /** Makes a pool for RBD images. */
  async createRbdPool(pool: string): Promise<void> {
    await this.client.monitor({ prefix: 'osd pool create', pool })
    await this.client.initPool(pool)
  }

  /** Makes a user that may use RBD images in all pools, or what `osdRights` says, with a keyring of its own. */
  async createUser(user: string, osdRights = 'profile rbd'): Promise<CephUser> {
    const keyring = join(this.folder, `client.${user}.keyring`)
    const caps = ['mon', 'profile rbd', 'osd', osdRights]
    const text = await this.client.monitor({
      prefix: 'auth get-or-create',
      entity: `client.${user}`,
      caps,
    })
    const secret = /key = (\S+)/.exec(text)?.[1]
    if (secret === undefined) throw new Error(`The user ${user} has no key.`)
    await writeFile(keyring, `${text}\n`, { mode: 0o600 })
    return { user, keyring, secret }
  }

  /** Has the cluster hang, connections and all, until {@link CephLab.resume}. */
  async pause(): Promise<void> {
    await Promise.all(this.#daemons.map(daemon => daemon.pause()))
  }

  /** Has it go on. */
  resume(): void {
    for (const daemon of this.#daemons) daemon.resume()
  }

  /** @internal */
  async start(capacity: number): Promise<void> {
    const [v2 = 0, v1 = 0] = await freePorts(2)
    const id = randomUUID()
    const address = `[v2:127.0.0.1:${v2},v1:127.0.0.1:${v1}]`
    this.#monitor = `127.0.0.1:${v1}`
    await writeFile(this.conf, clusterConfig(this.folder, id, address, capacity))
    await this.#createKeyring()
    const map = join(this.folder, 'monmap')
    await execa('monmaptool', ['--create', '--fsid', id, '--addv', 'a', address, map])
    for (const name of ['mon', 'osd']) await mkdir(join(this.folder, name))

    await this.run('ceph-mon', '--mkfs', '-i', 'a', '--monmap', map, '--keyring', this.#keyring)
    this.#spawn('ceph-mon', 'a')
    const uuid = randomUUID()
    // The same uuid for both, or the OSD never comes up.
    await this.client.monitor({ prefix: 'osd new', uuid, id: 0 })
    await this.run('ceph-osd', '--mkfs', '-i', '0', '--osd-uuid', uuid)
    const osd = this.#spawn('ceph-osd', '0')
    const isUp = async () =>
      JSON.parse(await this.client.monitor({ prefix: 'osd stat', format: 'json' })).num_up_osds === 1
    await osd.ready(isUp, START_TIMEOUT_MS)
  }

  /** Ends the cluster and removes its files. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#client?.[Symbol.asyncDispose]()
    await Promise.all(this.#daemons.map(daemon => daemon.kill()))
    // A client that still ends may be removing its own socket there.
    await rm(this.folder, { recursive: true, force: true, maxRetries: 10 })
  }

  get #keyring(): string {
    return join(this.folder, 'keyring')
  }

  #spawn(program: string, id: string): LabDaemon {
    const daemon = new LabDaemon(
      program,
      ['-f', '--conf', this.conf, '-i', id],
      join(this.folder, `${program}.out`),
    )
    this.#daemons.push(daemon)
    return daemon
  }

  /** One keyring for all: the monitor takes the keys and their rights from it when it is made. */
  async #createKeyring(): Promise<void> {
    const all = 'allow *'
    const users: [name: string, ...caps: string[]][] = [
      ['mon.', '--cap', 'mon', all],
      ['client.admin', '--cap', 'mon', all, '--cap', 'osd', all, '--cap', 'mgr', all],
      ['client.rgw', '--cap', 'mon', all, '--cap', 'osd', all],
      ['osd.0', '--cap', 'mon', 'allow profile osd', '--cap', 'osd', all],
    ]
    await writeFile(this.#keyring, '', { mode: 0o600 })
    for (const [name, ...caps] of users) {
      await execa('ceph-authtool', [this.#keyring, '-n', name, '--gen-key', ...caps])
    }
  }
}

/**
 * Starts a {@link CephLab} in some 5 s. It needs root and the Debian packages ceph-mon, ceph-osd and
 * ceph-common. There is no manager (ceph-mgr): what reads and writes does without it, `ceph df` and `ceph
 * status` tell little.
 */
export async function startCeph({ capacity = 4 * 1024 ** 3 }: CephOptions = {}): Promise<CephLab> {
  const ceph = new CephLab(await mkdtemp(join(tmpdir(), 'varve-ceph-')))
  try {
    await ceph.start(capacity)
  } catch (error) {
    await ceph[Symbol.asyncDispose]()
    throw error
  }
  return ceph
}

/**
 * No snapshot is trimmed, only forgotten: trimming walks an object that all placement groups write to, which the memory store
 * does not guard, and the OSD dies of it now and then.
 */
function clusterConfig(folder: string, id: string, address: string, capacity: number): string {
  return `[global]
fsid = ${id}
mon_host = ${address}
public_addr = 127.0.0.1
run_dir = ${folder}
crash_dir = ${folder}/crash
admin_socket = ${folder}/$name.$pid.asok
log_file = ${folder}/$name.log
mon_cluster_log_file = ${folder}/cluster.log
keyring = ${folder}/keyring
mon_data = ${folder}/mon
osd_data = ${folder}/osd
osd_objectstore = memstore
memstore_device_bytes = ${capacity}
osd_max_trimming_pgs = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
auth_allow_insecure_global_id_reclaim = false
`
}
