import { expect, it } from 'vitest'
import { MapBudget } from '../src/map-budget.ts'

const endless = expect.objectContaining({ name: 'NbdError', code: 'NBD_PROTOCOL' })

it('the largest export without data is mapped, and one in a million replies of a sector or more', () => {
  const empty = new MapBudget()
  for (let at = 0xffff0000; at < 2 ** 53; at += 0xffff0000) empty.spend(1, at)
  const short = new MapBudget()
  for (let reply = 1; reply <= 2 ** 20; reply++) short.spend(2, reply * 512)
})

it('replies that tell next to nothing, too many replies, and too many extents are the end of a map', () => {
  const slow = new MapBudget()
  expect(() => {
    for (let reply = 1; reply <= 20_000; reply++) slow.spend(1, reply)
  }).toThrow(endless)
  const many = new MapBudget()
  expect(() => {
    for (let reply = 1; reply <= 2 ** 22 + 1; reply++) many.spend(1, reply * 65_536)
  }).toThrow(endless)
  const full = new MapBudget()
  expect(() => {
    for (let reply = 1; reply <= 65; reply++) full.spend(2 ** 20, reply * 2 ** 32)
  }).toThrow(endless)
})
