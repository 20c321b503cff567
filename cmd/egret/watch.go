package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// notes is the logger of commands that go on: what they print is as old as the last time that etcd answered, and who
// reads it is told beside it.
func notes(c *cobra.Command) *slog.Logger {
	return slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil))
}

// watched runs a command that goes on, and shows what it has to say where it prints. A picture on a terminal says
// itself whether it is old.
func watched(c *cobra.Command, etcd *etcdFlags, format string, run func(*store.Client, operator.Screen) error) error {
	s, log := screen(c), notes(c)
	if s.Size != nil && format == "" {
		log = quiet
	}
	client, err := etcd.dial(c.Context(), log)
	if err != nil {
		return err
	}
	defer client.Close()
	return run(client, s)
}

// screen is where a command prints.
func screen(c *cobra.Command) operator.Screen {
	s := operator.Screen{Out: c.OutOrStdout()}
	if f, ok := s.Out.(*os.File); ok && isTerminal(f) && os.Getenv("TERM") != "dumb" {
		s.Size = func() (columns, rows int) {
			size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
			if err != nil || size.Col == 0 || size.Row == 0 {
				return 80, 24 // a terminal that does not know, as a serial line
			}
			return int(size.Col), int(size.Row)
		}
	}
	return s
}
