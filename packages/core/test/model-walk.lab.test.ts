import { expect, test } from 'vitest'
import { ModelWalk } from './torture/model-walk.ts'
import { ProvingGround } from './torture/proving-ground.ts'

test('after random steps every backup restores to what the disks held', async () => {
  await using ground = await ProvingGround.create()
  const walk = new ModelWalk(ground, 11)
  await walk.run(20)
  expect(walk.log.length).toBeGreaterThan(20)
})
