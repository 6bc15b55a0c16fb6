import { test } from 'vitest'
import { expectSurvives, STAGES } from './qemu-kills.ts'
import { useVmSite } from './vm-site.ts'

const site = useVmSite()

test('QEMU may be killed in any stage: what was flushed stays, and no increment lacks any of it', () =>
  expectSurvives(site, STAGES))
