import { readdirSync, readFileSync } from 'node:fs'

/** Ends every process that `pid` started, and those that they did, at once. Synchronous: nothing happens meanwhile. */
export function killDescendants(pid: number): void {
  const parents = new Map<number, number>()
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue
    const [, parent] = /^PPid:\s*(\d+)/m.exec(read(`/proc/${name}/status`)) ?? []
    parents.set(Number(name), Number(parent))
  }
  const found = new Set([pid])
  for (const parent of found) for (const [child, of] of parents) if (of === parent) found.add(child)
  found.delete(pid)
  for (const child of found) kill(child)
}

/** The command lines of the `qemu-nbd`s that have one of `texts` in theirs: of a socket's path, or of an image's. */
export function serversWith(...texts: readonly string[]): string[] {
  return readdirSync('/proc')
    .filter(name => /^\d+$/.test(name))
    .map(name => read(`/proc/${name}/cmdline`).replaceAll('\0', ' '))
    .filter(line => /^\S*qemu-nbd /.test(line) && texts.some(text => line.includes(text)))
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // it has ended by itself
  }
}

function read(path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return '' // it has ended
  }
}
