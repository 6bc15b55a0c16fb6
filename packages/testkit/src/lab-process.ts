import { readdir, readFile } from 'node:fs/promises'

/** The id of the process that has all of `texts` in its command line, other than this one. */
export async function findProcess(...texts: string[]): Promise<number | undefined> {
  return findCommandLine(commandLine => texts.every(text => commandLine.includes(text)))
}

/** The id of the process, other than this one, that has any of `texts` in its command line. */
export async function findProcessWithAny(texts: readonly string[]): Promise<number | undefined> {
  return findCommandLine(commandLine => texts.some(text => commandLine.includes(text)))
}

async function findCommandLine(isIt: (commandLine: string) => boolean): Promise<number | undefined> {
  for (const name of await readdir('/proc')) {
    const pid = Number(name)
    if (!Number.isInteger(pid) || pid === process.pid) continue
    // A process may end while we look.
    const commandLine = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
    if (isIt(commandLine)) return pid
  }
  return undefined
}
