import { randomUUID } from 'node:crypto'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import os from 'node:os'
import path from 'node:path'
import { execa } from 'execa'
import { buildGuest, type GuestImage } from './guest-image.ts'
import { defineLabDomain, type LabDomain, type LabDomainOptions, openLabDomain } from './lab-domain.ts'
import { type LibvirtDaemon, startLibvirtDaemon } from './libvirt-daemon.ts'

/** Whether the lab can run here. */
export type LibvirtAvailability =
  | { readonly available: true }
  /** `reason` is a sentence for people. */
  | { readonly available: false; readonly reason: string }

const programs: readonly (readonly [program: string, debianPackage: string])[] = [
  ['unshare', 'util-linux'],
  ['libvirtd', 'libvirt-daemon-system'],
  ['virsh', 'libvirt-clients'],
  ['qemu-system-x86_64', 'qemu-system-x86'],
  ['qemu-img', 'qemu-utils'],
]

/** A libvirt for this process alone; see {@link startLibvirt}. */
export class LibvirtLab implements AsyncDisposable {
  /** Everything that the lab writes is below this folder, which {@link LibvirtLab.stop} removes. */
  readonly root: string
  #daemon: LibvirtDaemon
  #guest: Promise<GuestImage> | undefined

  constructor(root: string, daemon: LibvirtDaemon) {
    this.root = root
    this.#daemon = daemon
  }

  /** The URI for libvirt's clients, such as `virsh --connect`. */
  get uri(): string {
    return this.#daemon.uri
  }

  /** The guest that domains of this lab boot. It is built for the first of them: most labs need none. */
  guest(): Promise<GuestImage> {
    this.#guest ??= buildGuest(path.join(this.root, 'guest'))
    return this.#guest
  }

  /** Runs `virsh` with these arguments and returns what it prints, in English. Rejects when it fails. */
  async virsh(args: readonly string[], timeoutMs = 120_000): Promise<string> {
    const { stdout } = await execa('virsh', ['--connect', this.uri, ...args], {
      timeout: timeoutMs,
      env: { LC_ALL: 'C' },
    })
    return stdout
  }

  /** Defines a domain; it is not started. */
  createDomain(options: LabDomainOptions): Promise<LabDomain> {
    return defineLabDomain(this, options)
  }

  /**
   * A running domain that something else defined from the definition of a lab domain, such as a restored copy.
   * Its command port must have a socket that libvirt chose.
   */
  openDomain(name: string): Promise<LabDomain> {
    return openLabDomain(this, name)
  }

  /**
   * Makes the key of a cephx user a secret of libvirt's and returns the secret's uuid, for {@link LabDisk.rbd}.
   *
   * @param visibility whether libvirt hands it to its clients. Default: `public`
   */
  async defineCephSecret(key: string, visibility: 'public' | 'private' = 'public'): Promise<string> {
    const uuid = randomUUID()
    const definition = path.join(this.root, `${uuid}.xml`)
    await writeFile(
      definition,
      `<secret ephemeral='no' private='${visibility === 'private' ? 'yes' : 'no'}'><uuid>${uuid}</uuid><usage type='ceph'><name>${uuid}</name></usage></secret>`,
    )
    await this.virsh(['secret-define', definition])
    await this.virsh(['secret-set-value', uuid, key])
    return uuid
  }

  /** A power cut of the host: all domains and the daemon die at once, then the daemon starts anew. */
  async powerCycle(): Promise<void> {
    await this.#daemon.stop('keep')
    await rm(path.join(this.root, 'run'), { recursive: true })
    this.#daemon = await startLibvirtDaemon(this.root)
  }

  /** Ends libvirtd and leaves its domains running; {@link LibvirtLab.startLibvirtd} starts it again. */
  stopLibvirtd(): Promise<void> {
    return this.#daemon.stopLibvirtd()
  }

  /** Starts libvirtd again; resolves when it answers. */
  startLibvirtd(): Promise<void> {
    return this.#daemon.startLibvirtd()
  }

  /** Ends all domains and the daemon, and removes the folder. */
  async stop(): Promise<void> {
    await this.#daemon.stop('remove')
  }

  /** Ends the domains and the daemons, and removes their folder. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.stop()
  }
}

/**
 * Starts a libvirt for this process alone: a libvirtd as root in mount and process namespaces of its own, with
 * all its files in a temporary folder. It neither sees nor disturbs a libvirt of the system or another lab.
 * It ends, and removes its folder, with {@link LibvirtLab.stop} or when this process ends, however it does.
 */
export async function startLibvirt(): Promise<LibvirtLab> {
  const root = await mkdtemp(path.join(os.tmpdir(), 'varve-lab-'))
  try {
    await mkdir(path.join(root, 'guest'))
    return new LibvirtLab(root, await startLibvirtDaemon(root))
  } catch (error) {
    await rm(root, { recursive: true, force: true })
    throw error
  }
}

/** Whether {@link startLibvirt} works here; it is tried, which takes about a second. */
export async function libvirtAvailable(): Promise<LibvirtAvailability> {
  const no = (reason: string): LibvirtAvailability => ({ available: false, reason })
  if (process.platform !== 'linux' || process.arch !== 'x64') return no('The lab needs Linux on x86-64.')
  if (process.getuid?.() !== 0) return no('The lab needs root, for namespaces and libvirtd.')
  for (const [program, debianPackage] of programs) {
    const { exitCode } = await execa(program, ['--version'], { reject: false, timeout: 10_000 })
    if (exitCode !== 0) return no(`${program} does not run: install the Debian package ${debianPackage}.`)
  }
  try {
    await using lab = await startLibvirt()
    await lab.guest()
    return { available: true }
  } catch (error) {
    return no(error instanceof Error ? error.message : String(error))
  }
}
