import childProcess from 'node:child_process'
import { writeFileSync } from 'node:fs'
import fs from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { RunJournal } from '../../src/journal.ts'
import { NbdTarget } from '../../src/nbd-target.ts'
import { Qcow2FileTarget } from '../../src/qcow2-file-target.ts'
import { RawFileTarget } from '../../src/raw-file-target.ts'
import type { RestoreTarget } from '../../src/restore-target.ts'
import { killDescendants } from './processes.ts'

/** When a victim dies. */
export interface Kill {
  /** At this point of its run, counted from 1. */
  readonly at: number
  /** Counts only the points of this label. */
  readonly label?: string
  /** `process` leaves the commands that it started running, as a crash does; `group` ends them too, as a power cut does. */
  readonly scope: 'process' | 'group'
  /** Where it says which point that was. */
  readonly diary: string
}

/**
 * The points at which a run may be cut short: before and after every record of its journal, when an external
 * command has been started and when it has ended, after every change of a file system, and after every write of a
 * restore to a disk. Each is counted, and the process kills itself at the chosen one.
 */
export class KillPoints {
  readonly labels: string[] = []
  #kill: Kill | undefined

  /** Begins to count, and to kill. */
  arm(kill: Kill | undefined): void {
    this.#kill = kill
    this.#watchJournal()
    this.#watchFiles()
    this.#watchCommands()
    this.#watchTargets()
    syncBuiltinESMExports()
  }

  reach(label: string): void {
    this.labels.push(label)
    const kill = this.#kill
    if (!kill || (kill.label !== undefined && kill.label !== label)) return
    const counted = kill.label === undefined ? this.labels : this.labels.filter(one => one === label)
    if (counted.length !== kill.at) return
    writeFileSync(kill.diary, label)
    if (kill.scope === 'group') killDescendants(process.pid)
    process.kill(process.pid, 'SIGKILL')
  }

  #watchJournal(): void {
    const { record, settled } = RunJournal.prototype
    const reach = this.reach.bind(this)
    RunJournal.prototype.record = async function (step) {
      reach(`before ${step.step}`)
      await record.call(this, step)
      reach(`after ${step.step}`)
    }
    RunJournal.prototype.settled = async function () {
      reach('before settled')
      await settled.call(this)
      reach('after settled')
    }
  }

  #watchFiles(): void {
    const reach = this.reach.bind(this)
    for (const name of ['rename', 'rm', 'unlink', 'link', 'mkdir', 'rmdir', 'chmod', 'writeFile'] as const) {
      const call: (...args: unknown[]) => Promise<unknown> = fs[name].bind(fs) as never
      Reflect.set(fs, name, async (...args: unknown[]) => {
        const result = await call(...args)
        reach(`${name} done`)
        return result
      })
    }
  }

  #watchTargets(): void {
    const reach = this.reach.bind(this)
    for (const { prototype } of [Qcow2FileTarget, RawFileTarget, NbdTarget]) {
      for (const name of ['write', 'zero'] as const) {
        const call: (...args: unknown[]) => Promise<void> = prototype[name] as never
        Reflect.set(prototype, name, async function (this: RestoreTarget, ...args: unknown[]) {
          await call.apply(this, args)
          reach(`target ${name} done`)
        })
      }
    }
  }

  #watchCommands(): void {
    const reach = this.reach.bind(this)
    const { spawn } = childProcess
    Reflect.set(childProcess, 'spawn', (command: string, args: string[], options: object) => {
      const child = spawn(command, args, options)
      const label = `${command} ${verbOf(args)}`
      reach(`start ${label}`)
      child.once('exit', () => reach(`end ${label}`))
      return child
    })
  }
}

/** What a command does, such as `snap create`: the first words of its arguments that are no options. */
function verbOf(args: readonly string[]): string {
  const isWord = (arg: string) => /^[a-z][a-z-]+$/.test(arg)
  const all = args.flatMap(arg => arg.split(' ')) // several commands may be in one argument
  const first = all.findIndex(isWord)
  const words = first < 0 ? [] : all.slice(first)
  const end = words.findIndex(arg => !isWord(arg))
  return words.slice(0, end < 0 ? undefined : end).join(' ')
}
