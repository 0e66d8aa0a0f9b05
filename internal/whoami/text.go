// SPDX-License-Identifier: Apache-2.0

package whoami

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
)

// oneLine returns JSON without line breaks.
func oneLine(value json.RawMessage) string {
	var out bytes.Buffer
	if err := json.Compact(&out, value); err != nil {
		return string(value)
	}
	return out.String()
}

// printable replaces the control characters in text. The control server chooses names and
// grants, and a terminal would execute escape sequences in them.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

// WriteText writes f to w for a terminal.
func (f *Facts) WriteText(w io.Writer) error {
	var out bytes.Buffer
	who := f.Login
	if who == "" {
		who = "device " + f.Device
	} else if f.Device != "" {
		who += " on " + f.Device
	}
	fmt.Fprintf(&out, "%s (%s), says tailnet node %q", printable(who), f.Address, f.Proxy)
	if len(f.Listen) > 0 {
		fmt.Fprintf(&out, " of the server on %s", strings.Join(f.Listen, ", "))
	}
	out.WriteString("\n")

	table := tabwriter.NewWriter(&out, 0, 0, 3, ' ', 0)
	row := func(label string, values ...string) {
		for i, value := range values {
			values[i] = printable(value)
		}
		fmt.Fprintf(table, "  %s\t%s\n", label, strings.Join(values, "\t"))
	}
	if f.Refused != "" {
		row("refused", f.Refused)
	} else {
		row("user", f.User)
	}
	for _, group := range f.Groups {
		row("group", group.Name, "from "+numbers(group.Grants))
	}
	if len(f.Groups) == 0 {
		row("groups", "none")
	}
	for _, cut := range f.Cut {
		row("not given", cut.Name, "from "+numbers(cut.Grants)+", left out by "+cut.Option)
	}
	if len(f.Tags) > 0 {
		row("tags", strings.Join(f.Tags, ", "))
	}
	if f.Shared {
		row("shared", "the device belongs to another tailnet")
	}
	if f.Refused == "" {
		switch r := f.Recording; {
		case r.Wanted && r.Enforced:
			row("recording", "sessions are recorded, or refused")
		case r.Wanted:
			row("recording", "sessions are recorded")
		default:
			row("recording", "no")
		}
	}
	for i, grant := range f.Grants {
		row(fmt.Sprintf("grant %d", i+1), f.Capability+": "+oneLine(grant.Value))
	}
	if len(f.Grants) == 0 {
		row("grants", "none for "+f.LooksFor)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err := w.Write(out.Bytes())
	return err
}
