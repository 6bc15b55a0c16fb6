import { expect, test } from 'vitest'
import { expectContent } from './torture/expect-content.ts'

const vda = Buffer.from('abc')
const vdb = Buffer.from('abd')

test.each([
  ['a disk that is lost', { vda }, { vda, vdb }, 'web-1: vdb is not there'],
  ['a disk that nobody knows', { vda, vdb }, { vda }, 'web-1: nobody knows vdb'],
  ['a byte that differs', { vda, vdb: vda }, { vda, vdb }, 'web-1: vdb differs first at 2: 99 and not 100'],
  ['a disk that is too short', { vda: vda.subarray(0, 2) }, { vda }, 'web-1: vda differs'],
])('the oracle of the torture runs sees %s', (_what, found, wanted, message) => {
  expect(() => expectContent('web-1', found, wanted)).toThrow(message)
})

test('the oracle of the torture runs lets be what is right', () => {
  expectContent('web-1', { vda, vdb }, { vda: Buffer.from(vda), vdb: Buffer.from(vdb) })
})
