package conntrack

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Marked returns the entries with that mark, of both IP families, in the network namespace of the calling thread. The
// kernel chooses them: it looks at the whole table, and hands over those. An error means that some may be missing.
func Marked(m egress.Mark) ([]Connection, error) {
	flows, err := Flows(m, ^egress.Mark(0))
	all := make([]Connection, len(flows))
	for i, f := range flows {
		all[i] = f.Connection
	}
	return all, err
}

// Flows returns the entries whose mark has the bits of mask as m has them, likewise.
func Flows(m, mask egress.Mark) (all []Flow, err error) {
	err = eachMarked(m, mask, func() (func(Flow), func()) {
		var part []Flow
		return func(f Flow) { part = append(part, f) }, func() { all = append(all, part...) }
	})
	if err != nil {
		return nil, fmt.Errorf("listing connections: %w", err)
	}
	return all, nil
}

// CountByID returns how many entries with Egret's tag that count there are of each egress IP, by its id, likewise.
func CountByID(counts func(Connection) bool) (map[egress.ID]int, error) {
	all := map[egress.ID]int{}
	err := eachMarked(egress.ConnTag, egress.ConnTagMask, func() (func(Flow), func()) {
		part := map[egress.ID]int{}
		add := func(f Flow) {
			if counts(f.Connection) {
				part[egress.ID(f.Mark&^egress.ConnTagMask)]++
			}
		}
		return add, func() {
			for id, n := range part {
				all[id] += n
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("counting connections: %w", err)
	}
	return all, nil
}

// eachMarked lists the entries of both IP families whose mark has the bits of mask as m has them. begin is called at
// the start of each listing: add is called for each of its entries, keep at its end, unless it was interrupted and is
// begun anew.
func eachMarked(m, mask egress.Mark, begin func() (add func(Flow), keep func())) error {
	t, err := open()
	if err != nil {
		return err
	}
	defer t.nl.Close()
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		for n := 1; ; n++ {
			add, keep := begin()
			err := t.list(family, Filter{Mark: m, Mask: mask}, func(f Flow, _ []byte) { add(f) })
			if errors.Is(err, errInterrupted) && n < dumps {
				continue
			}
			if err != nil {
				return err
			}
			keep()
			break
		}
	}
	return nil
}
