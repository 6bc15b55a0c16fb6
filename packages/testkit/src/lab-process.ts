import { readdir, readFile } from 'node:fs/promises'
import { pollUntil } from './lab-poll.ts'

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

/** Whether a process has been stopped, with all its threads; Linux only. */
export async function isPaused(pid: number): Promise<boolean> {
  const threads = await readdir(`/proc/${pid}/task`)
  const states = threads.map(async thread => /^State:\s+(\w)/m.exec(await statusOf(pid, thread))?.[1])
  return (await Promise.all(states)).every(state => state === 'T')
}

/**
 * Stops a process with SIGSTOP and waits until none of its threads runs: one of them may serve a request that is sent
 * right after the signal. SIGCONT has it go on.
 */
export async function pauseProcess(pid: number): Promise<void> {
  process.kill(pid, 'SIGSTOP')
  await pollUntil(
    async () => (await isPaused(pid)) || undefined,
    10_000,
    () => `The process ${pid} runs on, 10 s after SIGSTOP.`,
  )
}

async function statusOf(pid: number, thread: string): Promise<string> {
  return readFile(`/proc/${pid}/task/${thread}/status`, 'utf8').catch(() => '') // ended meanwhile
}
