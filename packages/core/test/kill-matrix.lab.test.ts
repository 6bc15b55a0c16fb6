import { expect, test } from 'vitest'
import { scenarioOf, stepsWithoutACase } from './torture/kill-matrix.ts'
import { AFTER_PIVOT, SAMPLE, type StepCase, testCases } from './torture/sample.ts'

test('every step that a journal may hold has a run that is killed before and after it', () => {
  expect(stepsWithoutACase()).toEqual([])
})

// What is left incomplete is told of again where recover() dies right after it has recorded that.
const half: StepCase = {
  scenario: scenarioOf('restore in place that fails at its second disk'),
  kill: { at: 1, label: 'before incomplete' },
  recoverKill: 2,
  seed: 1,
}

const run = testCases([...SAMPLE, half, AFTER_PIVOT])

test('a restore in place that dies when a part of a disk is written leaves it incomplete', async () => {
  const { end, settled } = await run({
    scenario: scenarioOf('restore in place of images'),
    kill: { at: 2, label: 'target write done' },
    scope: 'group',
    seed: 2,
  })
  expect(end).toEqual({ killed: true, point: 'target write done' })
  expect(settled.map(({ outcome }) => outcome)).toEqual(['incomplete'])
})
