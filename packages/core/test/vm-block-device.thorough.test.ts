import type { LabDomain } from '@varve/testkit/lab'
import { test } from 'vitest'
import { useBlockDevices } from './block-devices.ts'

const { site, rebootRenumbered, makeJournalsOld, expectRecovered } = useBlockDevices()

// Beside those of vm-block-device.lab.test.ts: the same merges, of a device whose number is as it was or of an instance that runs.
test.each([
  { what: 'it runs on', happens: async () => undefined },
  {
    what: 'renumbered, with an older journal',
    happens: async () => {
      await rebootRenumbered()
      await makeJournalsOld()
    },
  },
  { what: 'it is destroyed', happens: (vm: LabDomain) => vm.destroy() },
  { what: 'the host reboots', happens: () => site.lab.powerCycle() },
  {
    what: 'renumbered, and started again',
    happens: async (vm: LabDomain) => {
      await rebootRenumbered()
      await vm.start()
    },
  },
])('an instance on block devices is as before once a killed backup is recovered: $what', ({ happens }) =>
  expectRecovered(happens),
)
