package operator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const timeFormat = "2006-01-02T15:04:05.000Z07:00"

// History writes who held an IP, since when, and why, the oldest first, as Get writes records.
func History(ctx context.Context, c *store.Client, ip netip.Addr, format string, w io.Writer) error {
	if err := CheckFormat(format); err != nil {
		return err
	}
	tenures, faulty := c.History(ctx, ip)
	if faulty != nil && tenures == nil {
		return faulty
	}
	explain(tenures)
	acts, unreadable, err := c.Acts(ctx)
	if err != nil {
		return err
	}
	faulty = errors.Join(faulty, unread(unreadable))
	l := listing{kind: "history", header: "SINCE NODE FOR WHY FROM BY"}
	// What people did with the IP, in the table; -o json has the tenures, and `egret get acts` has all acts. Moves are
	// in it as tenures.
	addActs := func(before time.Time) {
		for len(acts) > 0 && (before.IsZero() || acts[0].Since.Before(before)) {
			if a := acts[0]; a.IP == ip && a.What != egress.ActMove {
				l.rows = append(l.rows, []string{a.Since.Format(timeFormat), dash(a.Node), "-", string(a.What), "-", a.By})
			}
			acts = acts[1:]
		}
	}
	for i, t := range tenures {
		addActs(t.Since)
		end := time.Now()
		if i+1 < len(tenures) {
			end = tenures[i+1].Since
		}
		l.records = append(l.records, t)
		l.rows = append(l.rows, []string{t.Since.Format(timeFormat), dash(t.Node), age(end, t.Since), string(t.Why), dash(t.From), dash(t.By)})
	}
	addActs(time.Time{})
	if len(l.rows) == 0 && faulty == nil {
		allocated, err := c.List(ctx, store.AllocationKey(ip))
		if err != nil {
			return err
		}
		if len(allocated) == 0 {
			return fmt.Errorf("nobody held %s, as far as etcd remembers, and no egress uses it: `egret get allocations` lists the "+
				"addresses in use", ip)
		}
	}
	if err := l.write(format, w); err != nil {
		return fmt.Errorf("printing the history of %s: %w", ip, err)
	}
	return faulty
}

// explain names what a claimer cannot know: that the owner before it had not given the IP back, so its lease has ended.
func explain(tenures []egress.Tenure) {
	for i := 1; i < len(tenures); i++ {
		if before := tenures[i-1]; tenures[i].Why == egress.ReasonClaim && before.Node != "" {
			tenures[i].Why, tenures[i].From = egress.ReasonCrash, before.Node
		}
	}
}
