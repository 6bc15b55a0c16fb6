import { expect, test } from 'vitest'
import { ELSEWHERE, stepsWithoutARun } from '../../ceph/test/kill/kill-runs.ts'
import { stepsWithoutACase, WITHOUT_A_CASE } from './torture/kill-matrix.ts'

test('no step of a journal is left by both torture runs to the other', () => {
  expect([...stepsWithoutACase(), ...stepsWithoutARun()]).toEqual([])
  expect(WITHOUT_A_CASE.filter(step => ELSEWHERE.includes(step))).toEqual([])
})
