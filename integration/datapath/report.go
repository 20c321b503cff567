package datapath

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// WriteCSV writes a header and a line per result: round, path, a value for each of Columns, the path that it is
// compared with, and the ratio to that path's value in the same round for each of Columns; above 1 is better. A path
// that is compared with none has no ratios.
func WriteCSV(w io.Writer, results []Result) error {
	text := "round,path"
	for _, c := range Columns {
		text += fmt.Sprintf(",%s_%s", c.Name, strings.NewReplacer("1/s", "per_s", "/", "_per_").Replace(c.Unit))
	}
	text += ",base"
	for _, c := range Columns {
		text += fmt.Sprintf(",%s_ratio", c.Name)
	}
	text += "\n"
	for _, r := range results {
		text += fmt.Sprintf("%d,%s", r.Round, r.Path)
		for _, v := range r.Values {
			text += fmt.Sprintf(",%.1f", v)
		}
		i := slices.IndexFunc(Paths, func(p Path) bool { return p.Name == r.Path })
		text += "," + Paths[i].Base
		for column := range Columns {
			text += ","
			if ratios := Ratios(ofRound(results, r.Round), Paths[i], column); ratios.Median > 0 {
				text += fmt.Sprintf("%.3f", ratios.Median) // of one round
			}
		}
		text += "\n"
	}
	_, err := io.WriteString(w, text)
	return err
}

// Spread is the median of some values, and the smallest and largest of them.
type Spread struct{ Min, Median, Max float64 }

func spread(values []float64) Spread {
	slices.Sort(values)
	n := len(values)
	if n == 0 {
		return Spread{}
	}
	return Spread{values[0], (values[(n-1)/2] + values[n/2]) / 2, values[n-1]}
}

// Values returns what was measured of a path in a column.
func Values(results []Result, path string, column int) Spread {
	var all []float64
	for _, r := range results {
		if r.Path == path {
			all = append(all, r.Values[column])
		}
	}
	return spread(all)
}

// Ratios returns how a path compares with its Base in a column, round by round: above 1 is better, also where less is.
func Ratios(results []Result, p Path, column int) Spread {
	base := map[int]float64{}
	for _, r := range results {
		if r.Path == p.Base {
			base[r.Round] = r.Values[column]
		}
	}
	var all []float64
	for _, r := range results {
		if b := base[r.Round]; r.Path == p.Name && b > 0 && r.Values[column] > 0 {
			ratio := r.Values[column] / b
			if Columns[column].Less {
				ratio = 1 / ratio
			}
			all = append(all, ratio)
		}
	}
	return spread(all)
}

// WriteTable writes the median of each path and column with the smallest and largest value, and then the ratios so.
func WriteTable(w io.Writer, results []Result) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name string, cell func(column int) string) {
		fmt.Fprint(t, name)
		for i := range Columns {
			fmt.Fprint(t, "\t", cell(i))
		}
		fmt.Fprintln(t)
	}
	row("PATH", func(i int) string { return fmt.Sprintf("%s %s", Columns[i].Name, Columns[i].Unit) })
	for _, p := range Paths {
		row(p.Name, func(i int) string {
			s := Values(results, p.Name, i)
			return fmt.Sprintf("%.0f (%.0f-%.0f)", s.Median, s.Min, s.Max)
		})
	}
	for _, p := range Paths {
		if p.Base != "" {
			row(p.Name+"/"+p.Base, func(i int) string {
				s := Ratios(results, p, i)
				return fmt.Sprintf("%.3f (%.2f-%.2f)", s.Median, s.Min, s.Max)
			})
		}
	}
	return t.Flush()
}

// WriteSVG draws, for each column and each path with a Base, the ratio of every round as a dot and their median as a
// line, over 0 to 1.5.
func WriteSVG(w io.Writer, results []Result) error {
	const left, top, width, height, most = 50, 40, 720, 260, 1.5
	colors := []string{"#1f5fa8", "#b5541c", "#3a7d34"}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n"+
		`<rect width="100%%" height="100%%" fill="white"/>`+"\n", left+width+20, top+height+40)
	y := func(ratio float64) float64 { return top + height*(1-min(ratio, most)/most) }
	for _, v := range []float64{0, 0.25, 0.5, 0.75, 1, 1.25, 1.5} {
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.0f" y2="%.0f" stroke="#ddd"/><text x="%d" y="%.0f" text-anchor="end">%g</text>`+"\n",
			left, left+width, y(v), y(v), left-8, y(v)+4, v)
	}
	n := 0
	for _, p := range Paths {
		if p.Base == "" {
			continue
		}
		color := colors[n%len(colors)]
		fmt.Fprintf(&b, `<text x="%d" y="24" fill="%s">%s/%s</text>`+"\n", left+n*200, color, p.Name, p.Base)
		for i := range Columns {
			x := left + width*(float64(i)+0.25*float64(n+1))/float64(len(Columns))
			m := Ratios(results, p, i).Median
			fmt.Fprintf(&b, `<line x1="%.0f" x2="%.0f" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="2"/>`+"\n", x-12, x+12, y(m), y(m), color)
			for round := range rounds(results) {
				fmt.Fprintf(&b, `<circle cx="%.0f" cy="%.1f" r="2.5" fill="%s"/>`+"\n", x, y(Ratios(ofRound(results, round+1), p, i).Median), color)
			}
		}
		n++
	}
	for i, c := range Columns {
		fmt.Fprintf(&b, `<text x="%.0f" y="%d" text-anchor="middle">%s</text>`+"\n", left+width*(float64(i)+0.5)/float64(len(Columns)), top+height+24, c.Name)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func rounds(results []Result) (n int) {
	for _, r := range results {
		n = max(n, r.Round)
	}
	return n
}

func ofRound(results []Result, round int) (out []Result) {
	for _, r := range results {
		if r.Round == round {
			out = append(out, r)
		}
	}
	return out
}
