package conntrack

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// CountByID returns how many entries there are of each egress IP, by its id, in the network namespace of the calling thread. The kernel looks at the whole
// table, and hands over those with Egret's tag alone. An error means that some may be missing.
func CountByID() (map[egress.ID]int, error) {
	t, err := open()
	if err != nil {
		return nil, err
	}
	defer t.nl.Close()
	all := map[egress.ID]int{}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		for n := 1; ; n++ {
			part := map[egress.ID]int{}
			err := t.list(family, Filter{Mark: egress.ConnTag, Mask: egress.ConnTagMask}, func(c Flow, _ []byte) {
				part[egress.ID(c.Mark&^egress.ConnTagMask)]++
			})
			if errors.Is(err, errInterrupted) && n < dumps {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("counting connections: %w", err)
			}
			for id, n := range part {
				all[id] += n
			}
			break
		}
	}
	return all, nil
}
