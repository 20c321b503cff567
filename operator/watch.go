package operator

import (
	"context"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/store"
)

// watched are the keys by which the rows of a kind change.
var watched = map[string][]string{
	KindBlocks:  {store.BlockPrefix},
	kindMembers: {store.MembersByEgress},
	"nodes":     {store.NodePrefix, store.AgentPrefix, store.OwnerPrefix, store.CordonPrefix},
	"egresses":  {store.EgressPrefix, store.OwnerPrefix},
	"moves":     {store.MovePrefix, store.OwnerPrefix, store.AgentPrefix},
	"pools":     {store.PoolPrefix, store.AllocationPrefix},
}

// Watch writes the records of a kind as a table, and then the row of each that comes, changes or goes, until ctx ends,
// and then returns nil. What goes is written as it was, with the word "deleted" behind. Records that cannot be read are
// left out.
func Watch(ctx context.Context, c *store.Client, kind string, w io.Writer) error {
	if err := Check(kind, ""); err != nil {
		return err
	}
	prefixes := watched[kind]
	if prefixes == nil {
		prefixes = []string{kind + "/"}
	}
	cache := c.NewCache(prefixes...)
	watch, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- cache.Run(watch) }()
	defer func() { stop(); <-done }()
	var shown changes
	for {
		select {
		case <-cache.Changed():
		case <-ctx.Done():
			return nil
		}
		look, err := look(ctx, c, kind)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		header, rows := shown.next(look)
		if err := writeTable(w, header, rows); err != nil {
			return err
		}
	}
}

// look reads a kind, and returns how it is listed at a time.
func look(ctx context.Context, c *store.Client, kind string) (func(time.Time) listing, error) {
	if kind == kindActs {
		acts, _, err := c.Acts(ctx)
		return func(time.Time) listing { return listActs(acts) }, err
	}
	if kind == KindBlocks {
		blocks, _, err := c.Blocks(ctx, netip.Addr{})
		return func(now time.Time) listing { return listBlocks(blocks, now) }, err
	}
	all, err := read(ctx, c, kind)
	return func(now time.Time) listing { return list(kind, all, now) }, err
}

// changes are the rows that were shown.
type changes struct {
	began time.Time // ages are of then where rows are compared: by getting older alone no row changes
	rows  map[string][]string
}

// next returns the rows that are not as they were shown, and the header, where it was not shown yet.
func (c *changes) next(look func(time.Time) listing) (header string, news [][]string) {
	l, first := look(time.Now()), c.began.IsZero()
	if first {
		c.began, header = time.Now(), l.header
	}
	now := map[string][]string{}
	for i, row := range look(c.began).rows {
		name := l.name(row)
		if now[name] = row; first || !slices.Equal(row, c.rows[name]) {
			news = append(news, l.rows[i])
		}
	}
	var gone []string
	for name := range c.rows {
		if now[name] == nil {
			gone = append(gone, name)
		}
	}
	slices.Sort(gone)
	for _, name := range gone {
		news = append(news, append(slices.Clone(c.rows[name]), "deleted"))
	}
	c.rows = now
	return strings.TrimSpace(header), news
}
