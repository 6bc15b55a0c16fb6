import { watch } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { filesOpenForWriting } from './process-files.ts'

/** How long between two looks at what is open; an upload of some megabytes takes longer. */
const LOOK_EVERY_MS = 100
/** A smaller file stages nothing, such as a definition for libvirt. */
const LEAST_BYTES = 65_536

/** What was seen of local files by {@link watchStaging}. */
export interface Staging<T> {
  /** What the work came to. */
  readonly value: T
  /** The names of all that has been in the folder for temporary files, as paths in it. */
  readonly temporary: readonly string[]
  /** The paths of files of 64 KiB or more that were open for writing, also of those whose names are gone. */
  readonly written: readonly string[]
}

/**
 * Does some work with a folder for temporary files of its own (`TMPDIR`), and notes what is in it meanwhile, and what
 * files this process, or a program that it starts for the work, has open for writing. Programs that ran before, such as
 * servers, are left out. Linux only.
 *
 * @param work is given a function that waits until all that is open has been looked at once more
 */
export async function watchStaging<T>(
  work: (looked: () => Promise<void>) => Promise<T>,
): Promise<Staging<T>> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-staging-'))
  const { TMPDIR } = process.env
  const temporary = new Set<string>()
  const written = new Set<string>()
  const before = new Set(await childrenOf(process.pid))
  const watcher = watch(folder, { recursive: true }, (_, name) => name !== null && temporary.add(name))
  const look = async (pid: number) => {
    for (const path of await filesOpenForWriting(pid, LEAST_BYTES)) written.add(path)
    for (const child of await childrenOf(pid)) if (!before.has(child)) await look(child)
  }
  let lookEnds = Promise.withResolvers<void>()
  const looked = async () => {
    await lookEnds.promise // of one that may have begun already
    await lookEnds.promise
  }
  process.env.TMPDIR = folder
  try {
    let done = false
    const outcome = work(looked).finally(() => {
      done = true
    })
    outcome.catch(() => undefined) // it is awaited below
    for (; !done; await delay(LOOK_EVERY_MS)) {
      await look(process.pid)
      lookEnds.resolve()
      lookEnds = Promise.withResolvers()
    }
    return { value: await outcome, temporary: [...temporary], written: [...written] }
  } finally {
    if (TMPDIR === undefined) delete process.env.TMPDIR
    else process.env.TMPDIR = TMPDIR
    watcher.close()
    await rm(folder, { recursive: true })
  }
}

/** Linux tells them without a look at every process. */
async function childrenOf(pid: number): Promise<number[]> {
  const text = await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8').catch(() => '') // it has ended
  return text.split(' ').filter(Boolean).map(Number)
}
