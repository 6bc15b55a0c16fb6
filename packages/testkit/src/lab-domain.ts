import { randomBytes, randomUUID } from 'node:crypto'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import path from 'node:path'
import { writeBareRawQemu } from './bare-raw-qemu.ts'
import { GuestChannel, GuestCommandError, type GuestResult } from './guest-channel.ts'
import type { GuestImage } from './guest-image.ts'
import { commandPortName } from './guest-init.ts'
import { GuestWriter, type GuestWriterOptions } from './guest-writer.ts'
import { type DomainFiles, haltingRom, labDomainXml } from './lab-domain-xml.ts'
import { pollUntil } from './lab-poll.ts'
import { findProcess } from './lab-process.ts'
import { ovmfFirmware } from './ovmf-firmware.ts'

/** A disk of a lab domain. */
export interface LabDisk {
  /** Its name in libvirt and in the guest, such as `vda`. */
  readonly target: string
  /** Absolute path of the image; with `rbd` the image's name, such as `vms/web-1`. */
  readonly path: string
  /** Whether `path` is a block device, or a link to one. Default: false. */
  readonly blockDevice?: boolean
  /** Where the image is one of a Ceph cluster. */
  readonly rbd?: {
    /** A monitor's address. */
    readonly monitor: string
    /** The user, without `client.`. */
    readonly user: string
    /** libvirt's secret with the user's key. */
    readonly secretUuid: string
  }
  /** The format of the image. */
  readonly format: 'qcow2' | 'raw'
  /** `unmap` passes the guest's discards on to the image. Default: QEMU's, which is to ignore them. */
  readonly discard?: 'unmap' | 'ignore'
  /** The serial number that the guest sees. */
  readonly serial?: string
}

/** What {@link LibvirtLab.createDomain} is to define. */
export interface LabDomainOptions {
  /** The domain's name. */
  readonly name: string
  /** Default: 256, or 32 without a guest. */
  readonly memoryMiB?: number
  /**
   * Whether a guest boots. Without one the processor halts at once, unless there is UEFI firmware to run: enough where
   * QEMU alone reads and writes, by {@link LabDomain.io}, and much lighter. Default: true.
   */
  readonly guest?: boolean
  /** Its disks, in their order. */
  readonly disks: readonly LabDisk[]
  /** Run the guest agent, for `domfsfreeze` and the like. Default: false. */
  readonly agent?: boolean
  /** Boot by UEFI firmware, with an NVRAM file of the domain's own. Default: false. */
  readonly uefi?: boolean
  /**
   * Let QEMU have raw images as newer versions of libvirt give them to it, without a node of the `raw` driver. Default: as
   * the lab's libvirt does.
   */
  readonly bareRaw?: boolean
  /** Start together with the libvirt daemon. Default: false. */
  readonly autostart?: boolean
}

/** Options of {@link LabDomain.run}. */
export interface GuestRunOptions {
  /** Milliseconds until the command is killed and the call rejects. Default: 60,000. */
  readonly timeoutMs?: number
  /** Whether an exit code other than 0 rejects, with a {@link GuestCommandError}. Default: true. */
  readonly reject?: boolean
}

/** A command that runs in the guest, as {@link LabDomain.spawn} started it. */
export interface GuestProcess {
  /** Resolves at its end, whatever the exit code; rejects when the guest goes away. */
  readonly result: Promise<GuestResult>
  /** Kills it and what it started. */
  kill(): void
}

/** What a domain needs of its lab. */
export interface DomainLab {
  readonly root: string
  guest(): Promise<GuestImage>
  virsh(args: readonly string[], timeoutMs?: number): Promise<string>
}

const UNDEFINE = ['--nvram', '--snapshots-metadata', '--checkpoints-metadata']
const dayMs = 24 * 60 * 60 * 1000

/** A libvirt domain whose guest takes commands from the test. */
export class LabDomain {
  /** The domain's name in libvirt. */
  readonly name: string
  /** UEFI only: the file with the domain's firmware variables. It exists from the first start on. */
  readonly nvram: string | undefined
  readonly #options: Omit<LabDomainOptions, 'name'>
  readonly #uuid: string
  readonly #lab: DomainLab
  readonly #files: DomainFiles
  readonly #channel: GuestChannel

  constructor(lab: DomainLab, options: LabDomainOptions, uuid: string, files: DomainFiles) {
    this.name = options.name
    this.#options = options
    this.#uuid = uuid
    this.nvram = files.firmware?.nvram
    this.#lab = lab
    this.#files = files
    this.#channel = new GuestChannel(files.commandSocket)
  }

  /** Starts the domain; resolves when QEMU runs, not when the guest is up. */
  async start(): Promise<void> {
    await this.#virsh('start')
  }

  /** Waits until the guest takes commands, and until the guest agent answers where the domain has one. */
  async waitForBoot(timeoutMs = 100_000): Promise<void> {
    try {
      await this.run('true', { timeoutMs })
      if (this.#options.agent) await this.#agentAnswers(timeoutMs)
    } catch (cause) {
      const console = await readFile(this.#files.consoleLog, 'utf8').catch(() => '')
      throw new Error(`The guest of ${this.name} did not boot. Its console says:\n${console}`, { cause })
    }
  }

  /** Starts the domain and waits as {@link LabDomain.waitForBoot} does. */
  async boot(timeoutMs?: number): Promise<void> {
    await this.start()
    await this.waitForBoot(timeoutMs)
  }

  /** As {@link deviceIo} for one of the disks, flushed at the end. */
  async io(target: string, ...commands: readonly string[]): Promise<void> {
    await deviceIo(this.#lab, this.name, target, [...commands, 'flush'])
  }

  /** Presses the power button and waits until the domain is off. The guest flushes and unmounts its disks. */
  async shutdown(timeoutMs = 60_000): Promise<void> {
    await this.#virsh('shutdown', '--mode', 'acpi')
    await this.waitForState('shut off', timeoutMs)
  }

  /** Pulls the plug: the guest's unflushed writes are lost. */
  async destroy(): Promise<void> {
    await this.#virsh('destroy')
  }

  /** Ends QEMU with SIGKILL, as the kernel does when memory runs out, and waits until libvirt has seen it. */
  async killQemu(): Promise<void> {
    process.kill(await this.qemuPid(), 'SIGKILL')
    await this.waitForState('shut off')
  }

  /** The id of the domain's QEMU process, as seen from outside of the lab's process namespace. */
  async qemuPid(): Promise<number> {
    const pid = await findProcess(`\0guest=${this.name},`, this.#uuid)
    if (pid === undefined) throw new Error(`${this.name} has no QEMU process.`)
    return pid
  }

  /** What `virsh domstate` says, such as `running` or `shut off`. */
  async state(): Promise<string> {
    return (await this.#virsh('domstate')).trim()
  }

  /** Waits until {@link LabDomain.state} is `state`. */
  async waitForState(state: string, timeoutMs = 60_000): Promise<void> {
    await pollUntil(
      async () => ((await this.state()) === state ? true : undefined),
      timeoutMs,
      async () => `${this.name} is ${await this.state()} and not ${state} after ${timeoutMs} ms.`,
    )
  }

  /** The definition: of the running domain, where it runs. */
  async xml(): Promise<string> {
    return this.#virsh('dumpxml')
  }

  /** Pulls the plug where it runs, and removes it as {@link LabDomain.undefine} does: one start of `virsh` for both. */
  async remove(): Promise<void> {
    this.#channel.close()
    const domain = `'${this.name.replaceAll("'", "'\\''")}'`
    // What is off cannot be destroyed; the exit code is that of the last command.
    await this.#lab.virsh([`destroy ${domain}; undefine ${domain} ${UNDEFINE.join(' ')}`])
  }

  /** Removes the domain from libvirt, with its NVRAM file and its checkpoints' metadata; the disks stay. */
  async undefine(): Promise<void> {
    this.#channel.close()
    await this.#virsh('undefine', ...UNDEFINE)
  }

  /**
   * Runs a shell command in the guest. Commands sent before the guest is up wait for it; several may run at
   * once. Rejects after the timeout, when the guest goes away, and with {@link GuestCommandError} for an exit
   * code other than 0.
   */
  async run(command: string, options: GuestRunOptions = {}): Promise<GuestResult> {
    if (this.#options.guest === false) throw new Error(`${this.name} has no guest that could run ${command}.`)
    const result = await this.#channel.run(command, options.timeoutMs ?? 60_000).result
    if (result.exitCode !== 0 && options.reject !== false) throw new GuestCommandError(command, result)
    return result
  }

  /** Starts a shell command in the guest that goes on while the test does something else, for a day at most. */
  spawn(command: string): GuestProcess {
    const { id, result } = this.#channel.run(command, dayMs)
    // The guest may be powered off before anyone looks at the result.
    result.catch(() => undefined)
    return { result, kill: () => this.#channel.kill(id) }
  }

  /** Starts to write marked blocks all over a device of the guest, until the writer is stopped. */
  startWriter(options: GuestWriterOptions): GuestWriter {
    return new GuestWriter(this, options)
  }

  /** Sends a QMP command to QEMU and returns what its `return` holds. */
  async qmp(execute: string, args: object = {}): Promise<unknown> {
    const reply: unknown = JSON.parse(
      await this.#virsh('qemu-monitor-command', JSON.stringify({ execute, arguments: args })),
    )
    if (typeof reply === 'object' && reply !== null && 'return' in reply) return reply.return
    throw new Error(`QMP ${execute} failed: ${JSON.stringify(reply)}`)
  }

  async #agentAnswers(timeoutMs: number): Promise<void> {
    const ping = '{"execute":"guest-ping"}'
    await pollUntil(
      () =>
        this.#virsh('qemu-agent-command', ping).then(
          () => true,
          () => undefined, // not connected yet
        ),
      timeoutMs,
      () => `The guest agent of ${this.name} does not answer after ${timeoutMs} ms.`,
    )
  }

  #virsh(verb: string, ...args: string[]): Promise<string> {
    return this.#lab.virsh([verb, this.name, ...args])
  }
}

/** Defines a domain in the lab's libvirt; it is not started. */
export async function defineLabDomain(lab: DomainLab, options: LabDomainOptions): Promise<LabDomain> {
  // Not named after the domain: a socket's path has room for 107 bytes only.
  const folder = path.join(lab.root, 'domains', randomBytes(4).toString('hex'))
  await mkdir(folder, { recursive: true })
  const hasGuest = options.guest !== false
  const rom = hasGuest || options.uefi ? undefined : path.join(folder, 'rom')
  if (rom !== undefined) await writeFile(rom, haltingRom())
  const files: DomainFiles = {
    ...(hasGuest && { guest: await lab.guest() }),
    ...(rom !== undefined && { rom }),
    commandSocket: path.join(folder, 'command'),
    consoleLog: path.join(folder, 'console.log'),
    ...(options.uefi && { firmware: { ...(await ovmfFirmware()), nvram: path.join(folder, 'nvram') } }),
    ...(options.bareRaw && { qemu: path.join(folder, 'qemu') }),
  }
  if (files.qemu !== undefined) await writeBareRawQemu(files.qemu)
  const definition = path.join(folder, 'domain.xml')
  const uuid = randomUUID()
  await writeFile(definition, labDomainXml(options, uuid, files))
  await lab.virsh(['define', definition])
  if (options.autostart) await lab.virsh(['autostart', options.name])
  return new LabDomain(lab, options, uuid, files)
}

/**
 * Has the QEMU of a running domain carry out `qemu-io` commands on a disk such as `vda`: through the device, to
 * wherever that writes at the moment, as for a guest. No guest has to be up. What a command prints goes to QEMU's own
 * output, where nobody sees it: a read proves nothing here, and is refused.
 */
export async function deviceIo(
  lab: Pick<DomainLab, 'virsh'>,
  domain: string,
  target: string,
  commands: readonly string[],
): Promise<void> {
  const read = commands.find(command => /^(a?read|map|length)\b/.test(command))
  if (read !== undefined)
    throw new Error(`Nobody would see what ${JSON.stringify(read)} says. Read the image.`)
  const index = target.charCodeAt(2) - 'a'.charCodeAt(0) // libvirt numbers its aliases by this letter
  const device = `/machine/peripheral/virtio-disk${index}/virtio-backend`
  const lines = commands.map(
    command => `qemu-monitor-command ${domain} --hmp 'qemu-io -d ${device} "${command}"'`,
  )
  const said = await lab.virsh([lines.join('; ')])
  if (/failed|error|invalid|unknown|not found/i.test(said)) throw new Error(`qemu-io on ${target}: ${said}`)
}

/**
 * A running domain that was made from the definition of a lab domain, such as a restored copy. Its command port
 * must have a socket that libvirt chose.
 */
export async function openLabDomain(lab: DomainLab, name: string): Promise<LabDomain> {
  const xml = await lab.virsh(['dumpxml', name])
  const [port = ''] = xml.split('<channel ').filter(channel => channel.includes(commandPortName))
  const socket = /<source mode='bind' path='\/var\/lib\/libvirt\/([^']+)'/.exec(port)?.[1]
  if (socket === undefined)
    throw new Error(`libvirt chose no socket for the command port of ${name}:\n${xml}`)
  const consoleLog = /<serial type='file'>\s*<source path='([^']+)'/.exec(xml)?.[1] ?? ''
  const files = { commandSocket: path.join(lab.root, 'lib', socket), consoleLog }
  const uuid = /<uuid>([^<]+)</.exec(xml)?.[1] ?? ''
  return new LabDomain(lab, { name, disks: [] }, uuid, files)
}
