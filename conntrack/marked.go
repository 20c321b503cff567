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
	t, err := open()
	if err != nil {
		return nil, err
	}
	defer t.nl.Close()
	var all []Connection
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		for n := 1; ; n++ {
			var part []Connection
			err := t.list(family, Filter{Mark: m, Mask: ^egress.Mark(0)}, func(c Connection, _ []byte) { part = append(part, c) })
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
