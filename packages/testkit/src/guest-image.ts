import { constants } from 'node:fs'
import { access, readdir, readFile, writeFile } from 'node:fs/promises'
import path from 'node:path'
import { zstdDecompressSync } from 'node:zlib'
import { execa } from 'execa'
import { type CpioEntry, cpioArchive } from './cpio-archive.ts'
import { guestInit, guestShutdown, guestWriter } from './guest-init.ts'
import { unpackKernel } from './guest-kernel.ts'

/** A kernel and an initramfs that boot the lab's guest. */
export interface GuestImage {
  /** Path of the kernel, unpacked where it could be. */
  readonly kernel: string
  /** Path of the kernel as UEFI firmware boots it. */
  readonly efiKernel: string
  /** Path of the initramfs. */
  readonly initrd: string
}

// What the guest needs of the kernel, where it is not built in. evdev passes the power button on.
const modules = ['virtio_pci', 'virtio_blk', 'virtio_console', 'button', 'evdev', 'ext4']

const folder = 0o040755
const file = 0o100644
const program = 0o100755
const symbolicLink = 0o120777
const characterDevice = 0o020600

/**
 * Builds the lab's guest in `target`: a copy of this machine's kernel (a Debian cloud kernel where there is
 * one) and an initramfs with busybox, the guest agent and the modules that the kernel needs.
 *
 * Throws an error that names the missing Debian package.
 */
export async function buildGuest(target: string): Promise<GuestImage> {
  const release = await kernelRelease()
  const busybox = await requireProgram(['/bin/busybox', '/usr/bin/busybox'], 'busybox-static')
  const agent = await requireProgram(['/usr/sbin/qemu-ga', '/usr/bin/qemu-ga'], 'qemu-guest-agent')
  if ((await linkedLibraries(busybox)).length > 0) throw missing('a static busybox', 'busybox-static')

  const moduleFiles = await modulesInOrder(release)
  const entries: CpioEntry[] = [
    ...['bin', 'sbin', 'usr', 'usr/sbin', 'dev', 'proc', 'sys', 'run', 'tmp', 'mnt', 'lib', 'lib64'].map(
      name => ({ path: name, mode: folder }),
    ),
    // The kernel opens it as init's standard output before devtmpfs is mounted.
    { path: 'dev/console', mode: characterDevice, device: [5, 1] },
    { path: 'init', mode: program, data: Buffer.from(guestInit) },
    { path: 'sbin/shutdown', mode: program, data: Buffer.from(guestShutdown) },
    { path: 'bin/writer', mode: program, data: Buffer.from(guestWriter) },
    { path: 'bin/busybox', mode: program, data: await readFile(busybox) },
    ...(await applets(busybox)).map(name => ({
      path: `bin/${name}`,
      mode: symbolicLink,
      data: Buffer.from('busybox'),
    })),
    { path: 'usr/sbin/qemu-ga', mode: program, data: await readFile(agent) },
    {
      path: 'lib/guest-modules',
      mode: file,
      data: Buffer.from(moduleFiles.map(name => `/lib/${plainName(name)}\n`).join('')),
    },
  ]
  for (const name of moduleFiles)
    entries.push({ path: `lib/${plainName(name)}`, mode: file, data: await readModule(name) })
  for (const library of await linkedLibraries(agent)) {
    // The dynamic linker has a fixed path; it looks for all others in /lib.
    const name = library.includes('/ld-linux') ? library.slice(1) : `lib/${path.basename(library)}`
    entries.push({ path: name, mode: program, data: await readFile(library) })
  }

  const [packed, unpacked, initrd] = ['vmlinuz', 'vmlinux', 'initrd'].map(name =>
    path.join(target, name),
  ) as [string, string, string]
  const bzImage = await readFile(`/boot/vmlinuz-${release}`)
  await writeFile(packed, bzImage)
  const kernel = await unpackKernel(bzImage)
  if (kernel) await writeFile(unpacked, kernel)
  await writeFile(initrd, cpioArchive(entries))
  return { kernel: kernel ? unpacked : packed, efiKernel: packed, initrd }
}

/** The release of the kernel to boot: the newest Debian cloud kernel, else the newest one with its modules. */
async function kernelRelease(): Promise<string> {
  const installed = new Set(await listFolder('/lib/modules'))
  const releases = (await listFolder('/boot'))
    .filter(name => name.startsWith('vmlinuz-'))
    .map(name => name.slice('vmlinuz-'.length))
    .filter(release => installed.has(release))
    .sort((a, b) => a.localeCompare(b, 'en', { numeric: true }))
  const release = releases.findLast(name => name.includes('cloud')) ?? releases.at(-1)
  if (release === undefined) throw missing('a kernel in /boot with its modules', 'linux-image-cloud-amd64')
  return release
}

/** The files of {@link modules} and all that they depend on, each after what it depends on. */
async function modulesInOrder(release: string): Promise<string[]> {
  const root = `/lib/modules/${release}`
  const dependencies = new Map<string, string[]>()
  for (const line of (await readFile(`${root}/modules.dep`, 'utf8')).split('\n')) {
    const [name, needs] = line.split(':')
    if (name && needs !== undefined) dependencies.set(name, needs.split(' ').filter(Boolean))
  }
  const builtIn = await readFile(`${root}/modules.builtin`, 'utf8')

  const ordered = new Set<string>()
  const add = (name: string): void => {
    for (const needed of dependencies.get(name) ?? []) add(needed)
    ordered.add(name)
  }
  for (const module of modules) {
    if (builtIn.includes(`/${module}.ko`)) continue
    const name = [...dependencies.keys()].find(key => plainName(key) === `${module}.ko`)
    if (name === undefined) throw missing(`the kernel module ${module}`, 'linux-image-cloud-amd64')
    add(name)
  }
  return [...ordered].map(name => `${root}/${name}`)
}

/** `virtio.ko` for `/lib/modules/6.1/kernel/drivers/virtio/virtio.ko.xz`. */
function plainName(moduleFile: string): string {
  return path.basename(moduleFile).replace(/\.(xz|zst)$/, '')
}

async function readModule(name: string): Promise<Uint8Array> {
  if (name.endsWith('.zst')) return zstdDecompressSync(await readFile(name))
  if (!name.endsWith('.xz')) return readFile(name)
  return (await execa('xz', ['--decompress', '--stdout', name], { encoding: 'buffer', timeout: 30_000 }))
    .stdout
}

/** The commands that busybox has. */
async function applets(busybox: string): Promise<string[]> {
  const { stdout } = await execa(busybox, ['--list'], { timeout: 30_000 })
  return stdout.split('\n').filter(name => name !== 'busybox')
}

/** The shared libraries of a program, the dynamic linker among them. */
async function linkedLibraries(name: string): Promise<string[]> {
  const { stdout } = await execa('ldd', [name], { reject: false, timeout: 30_000 })
  return [...stdout.matchAll(/(\/\S+) \(0x/g)].flatMap(match => match[1] ?? [])
}

async function requireProgram(paths: readonly string[], debianPackage: string): Promise<string> {
  for (const name of paths) {
    if (
      await access(name, constants.X_OK).then(
        () => true,
        () => false,
      )
    )
      return name
  }
  throw missing(`${paths[0]}`, debianPackage)
}

async function listFolder(name: string): Promise<string[]> {
  return readdir(name).catch(() => [])
}

function missing(what: string, debianPackage: string): Error {
  return new Error(`The lab's guest needs ${what}: install the Debian package ${debianPackage}.`)
}
