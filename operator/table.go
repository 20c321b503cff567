package operator

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// table writes rows in columns, as kubectl does. What is written later stands below what was written before: columns
// only grow wider. The zero table is ready.
type table struct{ widths []int }

// gap is what is between two columns.
const gap = 3

// write writes a header, whose words are those of the columns and which is left out where it is empty, and rows. What a
// terminal would take for a command is replaced: others choose some of the texts.
func (t *table) write(w io.Writer, header string, rows [][]string) error {
	var all [][]string
	if header != "" {
		all = append(all, strings.Fields(header))
	}
	all = slices.Concat(all, rows)
	for i, row := range all {
		all[i] = make([]string, len(row))
		for j, cell := range row {
			all[i][j] = Printable(strings.ReplaceAll(cell, "\n", "; "), 2*len(cell))
			if j == len(t.widths) {
				t.widths = append(t.widths, 0)
			}
			if j < len(row)-1 { // the last one of a row takes what it takes
				t.widths[j] = max(t.widths[j], utf8.RuneCountInString(all[i][j]))
			}
		}
	}
	var out bytes.Buffer
	for _, row := range all {
		for i, cell := range row {
			out.WriteString(cell)
			if i < len(row)-1 {
				out.WriteString(strings.Repeat(" ", t.widths[i]-utf8.RuneCountInString(cell)+gap))
			}
		}
		out.WriteByte('\n')
	}
	_, err := w.Write(out.Bytes())
	return err
}

// writeTable writes a table at once.
func writeTable(w io.Writer, header string, rows [][]string) error {
	return new(table).write(w, header, rows)
}
