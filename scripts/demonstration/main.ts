import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { errorMessage } from '@varve/core'
import { type LibvirtLab, libvirtAvailable, startLibvirt } from '@varve/testkit/lab'
import { execa } from 'execa'
import { formatDuration } from '../../packages/cli/src/time-text.ts'
import { GuestSubject } from './guest-subject.ts'
import { ImageSubject } from './image-subject.ts'
import { Screen } from './screen.ts'
import { SOURCES, type Source } from './source.ts'
import { STORES, type Store } from './store.ts'
import { tellStory } from './story.ts'

const { values: options } = parseArgs({
  options: {
    image: { type: 'boolean' },
    source: { type: 'string', default: 'qcow2' },
    storage: { type: 'string', default: 'local' },
  },
})
const openStore = STORES.get(options.storage) ?? unknown('storage', options.storage, STORES)
const openSource = SOURCES.get(options.source) ?? unknown('source', options.source, SOURCES)
const asked = { available: false, reason: 'It was asked for images.' } as const
const { signal, ...giveUp } = endSignal()
const screen = new Screen(signal)
const startedAt = performance.now()
try {
  const { stdout } = await execa('qemu-img', ['--version'])
  const qemu = /\d+\.\d+\.\d+/.exec(stdout)?.[0] ?? 'unknown'
  screen.print(`\n    ${screen.bold('Varve')}  backs up a virtual machine while it writes, and proves it`)
  screen.print(screen.dim(`    QEMU ${qemu}, Node ${process.versions.node}, ${availableParallelism()} cores`))
  const libvirt = options.image ? asked : await libvirtAvailable()
  if (libvirt.available) await showGuest()
  else await showImages(libvirt.reason)
  const seconds = formatDuration((performance.now() - startedAt) / 1000)
  screen.print(`\n    ${screen.good('Everything was proved')} in ${seconds}; nothing of it is left behind.\n`)
} catch (error) {
  const message = signal.aborted ? 'Stopped. Nothing is left behind.' : errorMessage(error)
  screen.print(`\n    ${screen.bad(message)}\n`)
  process.exitCode = signal.aborted ? 130 : 1
} finally {
  giveUp.ignore()
}

async function showGuest(): Promise<void> {
  // The lab removes its folder, and all that is below, even if this process is killed.
  await using lab = await startLibvirt()
  const folder = join(lab.root, 'demo')
  await mkdir(folder)
  await using store = await openTheStore(folder)
  await using source = await openTheSource(folder, lab)
  const subject = await GuestSubject.create(lab, source, screen)
  await tellStory({ subject, store, folder, screen, signal })
}

async function openTheStore(folder: string): Promise<Store> {
  screen.print(screen.dim(`    Storage: ${options.storage}, which starts now`))
  const store = await openStore(folder)
  screen.print(screen.dim(`    Backups go to ${store.title}`))
  return store
}

async function openTheSource(folder: string, lab?: LibvirtLab): Promise<Source> {
  const source = await openSource(folder, lab)
  screen.print(screen.dim(`    The disks are ${source.title}`))
  return source
}

async function showImages(reason: string): Promise<void> {
  screen.print(`\n    No virtual machine here: ${reason} The same job on disk images:`)
  const folder = await mkdtemp(join(tmpdir(), 'varve-demo-'))
  try {
    await using store = await openTheStore(folder)
    await using source = await openTheSource(folder)
    const subject = new ImageSubject(folder, source, screen)
    await tellStory({ subject, store, folder, screen, signal })
  } finally {
    await rm(folder, { recursive: true })
  }
}

function unknown(what: string, name: string, known: ReadonlyMap<string, unknown>): never {
  console.error(`There is no ${what} ${name}. Choose one of: ${[...known.keys()].join(', ')}.`)
  process.exit(2)
}

/** Ctrl-C and its like end the demonstration where it is, and then everything is put away. */
function endSignal(): { signal: AbortSignal; ignore: () => void } {
  const controller = new AbortController()
  const names = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
  const stop = () => controller.abort(new Error('stopped'))
  for (const name of names) process.on(name, stop)
  process.stdout.on('error', stop) // nobody reads any more
  const ignore = () => {
    for (const name of names) process.off(name, stop)
  }
  return { signal: controller.signal, ignore }
}
