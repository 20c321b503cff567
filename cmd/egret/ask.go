package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/operator"
)

// question is what a command asks before it does what costs somebody something, and --yes, which answers it.
//
// It asks a person alone: at a terminal. Elsewhere there is nobody to answer, and whoever wrote a script has decided
// already; a command that refused there, or waited, would break what runs today, such as a drain before a reboot, at
// the worst time.
type question struct{ yes bool }

func (q *question) add(s *pflag.FlagSet) {
	s.BoolVarP(&q.yes, "yes", "y", false, "do not ask at a terminal; elsewhere nothing is asked")
}

// errDeclined says that a person did not say yes.
var errDeclined = errors.New("nothing was changed: the answer was not yes")

// ask says what will be done, and returns nil when it is to be done. what is asked for only where there is somebody to
// ask; where it is "" there is nothing to ask about.
func (q *question) ask(c *cobra.Command, what func() (string, error)) error {
	in, ok := c.InOrStdin().(*os.File)
	if q.yes || !ok || !isTerminal(in) || !isTerminal(c.ErrOrStderr()) {
		return nil
	}
	text, err := what()
	if err != nil || text == "" {
		return err
	}
	// What others wrote is in it: at a terminal that the person answers at.
	fmt.Fprintf(c.ErrOrStderr(), "%s\nGo on? [y/N] ", operator.PrintableLines(text))
	answer, err := readLine(c.Context(), in)
	if err != nil {
		fmt.Fprintln(c.ErrOrStderr())
		return fmt.Errorf("nothing was changed: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return errDeclined
}

// readLine reads a line, or returns when ctx ends: a read of a terminal does not, and is left behind then, since the
// process ends.
func readLine(ctx context.Context, r io.Reader) (string, error) {
	type answer struct {
		line string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		line, err := bufio.NewReader(r).ReadString('\n')
		if errors.Is(err, io.EOF) {
			err = nil // what is there is the answer
		}
		got <- answer{line, err}
	}()
	select {
	case a := <-got:
		return a.line, a.err
	case <-ctx.Done():
		return "", errors.New("interrupted")
	}
}

// isTerminal reports whether a reader or writer is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
