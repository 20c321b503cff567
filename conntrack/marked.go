package conntrack

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Marked returns the entries with that mark, of both IP families, in the network namespace of the calling thread. The kernel chooses them: it
// looks at the whole table, and hands over those. An error means that some may be missing.
func Marked(m egress.Mark) ([]Connection, error) {
	flows, err := Flows(m, ^egress.Mark(0))
	all := make([]Connection, len(flows))
	for i, f := range flows {
		all[i] = f.Connection
	}
	return all, err
}

// Flows returns the entries whose mark has the bits of mask as m has them, likewise.
func Flows(m, mask egress.Mark) ([]Flow, error) {
	t, err := open()
	if err != nil {
		return nil, err
	}
	defer t.nl.Close()
	var all []Flow
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		for n := 1; ; n++ {
			var part []Flow
			err := t.list(family, Filter{Mark: m, Mask: mask}, func(f Flow, _ []byte) { part = append(part, f) })
			if errors.Is(err, errInterrupted) && n < dumps {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("listing connections: %w", err)
			}
			all = append(all, part...)
			break
		}
	}
	return all, nil
}
