import fc from 'fast-check'

// One failure is enough to notice a change; the same draws each time, so that a score can be compared with another.
fc.configureGlobal({ seed: 1, endOnFailure: true })
