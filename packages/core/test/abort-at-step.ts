import { onTestFinished, vi } from 'vitest'
import { type JournalStep, RunJournal } from '../src/journal.ts'

/** A signal that is aborted as soon as a journal has recorded a step of that kind; nothing goes on before. */
export function abortAtStep(kind: JournalStep['step']): AbortSignal {
  const given = new AbortController()
  const { record } = RunJournal.prototype
  const recording = vi.spyOn(RunJournal.prototype, 'record').mockImplementation(async function (
    this: RunJournal,
    step,
  ) {
    await record.call(this, step)
    if (step.step !== kind) return
    recording.mockRestore()
    given.abort(new Error('enough'))
  })
  onTestFinished(() => recording.mockRestore()) // where it never came to that
  return given.signal
}
