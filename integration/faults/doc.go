// Package faults breaks a lab at random and checks that the invariants of docs/design.md hold all the while, from
// outside.
//
// A seed gives the schedule, computed beforehand without a look at the lab (Schedule); the tests inject it and judge.
// Each round ends with everything healed, and with every egress IP in service again. `make test-faults` runs it;
// docs/faults.md says what it injects and what it found.
package faults
