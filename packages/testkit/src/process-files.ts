import { readdir, readFile, readlink, stat } from 'node:fs/promises'

const ACCESS_MODE = 3 // O_RDONLY is 0

/** The paths of the regular files, of so many bytes or more, that a process has open for writing; Linux only. */
export async function filesOpenForWriting(pid: number | 'self', leastBytes = 0): Promise<string[]> {
  const paths = await namesIn(`/proc/${pid}/fd`)
  const open = paths.map(async fd => {
    try {
      const path = `/proc/${pid}/fd/${fd}`
      const target = await readlink(path)
      const [, flags = '0'] =
        /^flags:\s*(\d+)/m.exec(await readFile(`/proc/${pid}/fdinfo/${fd}`, 'utf8')) ?? []
      const writing = (Number.parseInt(flags, 8) & ACCESS_MODE) !== 0
      if (!writing) return undefined
      const file = await stat(path)
      if (!file.isFile() || file.size < leastBytes) return undefined
      return (await readlink(path)) === target ? target : undefined // or the number is another file's by now
    } catch {
      return undefined // closed meanwhile
    }
  })
  return (await Promise.all(open)).filter(path => path !== undefined)
}

/** The ids of the processes that this one has started, and of those that they have; Linux only. */
export async function childProcesses(): Promise<number[]> {
  const parents = new Map<number, number>()
  for (const name of await namesIn('/proc')) {
    if (!/^\d+$/.test(name)) continue
    const status = await readFile(`/proc/${name}/status`, 'utf8').catch(() => '') // ended meanwhile
    parents.set(Number(name), Number(/^PPid:\s*(\d+)/m.exec(status)?.[1]))
  }
  const found: number[] = []
  const below = new Set([process.pid])
  for (const parent of below) {
    for (const [pid, of] of parents) {
      if (of !== parent) continue
      found.push(pid)
      below.add(pid) // and then look for its own
    }
  }
  return found
}

/** Nothing where the process has ended. */
async function namesIn(folder: string): Promise<string[]> {
  return readdir(folder).catch(() => [])
}
