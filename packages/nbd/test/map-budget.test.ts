import { expect, it } from 'vitest'
import { MapBudget } from '../src/map-budget.ts'

const endless = expect.objectContaining({ name: 'NbdError', code: 'NBD_PROTOCOL' })

it('the largest export without data is mapped, and one in a million replies of a sector or more', () => {
  const empty = new MapBudget()
  for (let at = 0xffff0000; at < 2 ** 53; at += 0xffff0000) empty.spend(1, at)
  const short = new MapBudget()
  for (let reply = 1; reply <= 2 ** 20; reply++) short.spend(2, reply * 512)
})

it('replies that tell next to nothing, and too many replies, are the end of a map', () => {
  const slow = new MapBudget()
  expect(() => {
    for (let reply = 1; reply <= 20_000; reply++) slow.spend(1, reply)
  }).toThrow(endless)
  const many = new MapBudget()
  expect(() => {
    for (let reply = 1; reply <= 2 ** 22 + 1; reply++) many.spend(1, reply * 65_536)
  }).toThrow(endless)
})

it('too many extents are told from a server that breaks the protocol', () => {
  const full = new MapBudget()
  for (let reply = 1; reply <= 256; reply++) full.spend(2 ** 20, reply * 2 ** 32)
  expect(() => full.spend(1, 2 ** 41)).toThrow(
    expect.objectContaining({ code: 'NBD_FRAGMENTED', context: { extents: 2 ** 28 + 1, reached: 2 ** 41 } }),
  )
})
