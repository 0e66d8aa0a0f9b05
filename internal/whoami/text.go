// SPDX-License-Identifier: Apache-2.0

package whoami

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
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

// WriteText writes what is known about callers to w, for a terminal. Sites that say the same
// share a paragraph.
func WriteText(w io.Writer, all ...*Facts) error {
	type paragraph struct {
		who, facts string
		sites      sites
	}
	var paragraphs []*paragraph
	for _, f := range all {
		facts, err := f.text()
		if err != nil {
			return err
		}
		who := f.who()
		i := slices.IndexFunc(paragraphs, func(p *paragraph) bool { return p.who == who && p.facts == facts })
		if i < 0 {
			i = len(paragraphs)
			paragraphs = append(paragraphs, &paragraph{who: who, facts: facts})
		}
		paragraphs[i].sites.add(f)
	}
	for i, p := range paragraphs {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if _, err := fmt.Fprintf(w, "%s, says %s\n%s", p.who, p.sites, p.facts); err != nil {
			return err
		}
	}
	return nil
}

// sites are tailnet nodes, and the addresses on which servers listen on them.
type sites []site

type site struct {
	node, service string
	listen        []string
}

// add adds the site that says f.
func (s *sites) add(f *Facts) {
	i := slices.IndexFunc(*s, func(known site) bool { return known.node == f.Proxy && known.service == f.Service })
	if i < 0 {
		i = len(*s)
		*s = append(*s, site{node: f.Proxy, service: f.Service})
	}
	at := &(*s)[i]
	for _, address := range f.Listen {
		if !slices.Contains(at.listen, address) {
			at.listen = append(at.listen, address)
		}
	}
}

func (s sites) String() string {
	nodes := make([]string, len(s))
	for i, site := range s {
		nodes[i] = fmt.Sprintf("tailnet node %q", site.node)
		if site.service != "" {
			nodes[i] += fmt.Sprintf(" to who dials its Tailscale Service %q", site.service)
		}
		if len(site.listen) > 0 {
			nodes[i] += " on " + strings.Join(site.listen, ", ")
		}
	}
	return strings.Join(nodes, " and ")
}

// who names the caller.
func (f *Facts) who() string {
	who := f.Login
	if who == "" {
		who = "device " + f.Device
	} else if f.Device != "" {
		who += " on " + f.Device
	}
	return fmt.Sprintf("%s (%s)", printable(who), f.Address)
}

// text returns what is known about the caller, a fact a line.
func (f *Facts) text() (string, error) {
	var out strings.Builder
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
	for _, group := range f.HeldBack {
		row("on request", group.Name, "from "+numbers(group.Grants)+", with kubectl "+asking(f.User, group.Name))
	}
	for _, cut := range f.Cut {
		row("not given", cut.Name, "from "+numbers(cut.Grants)+", left out by "+cut.Option)
	}
	if len(f.Tags) > 0 {
		row("tags", strings.Join(f.Tags, ", "))
	}
	if f.TagsLeftOut {
		row("left out", "the tags are not groups, as a grant has a problem")
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
		for _, problem := range grant.Problems {
			row("problem", problem)
		}
	}
	if len(f.Grants) == 0 {
		row("grants", "none for "+f.LooksFor)
	}
	err := table.Flush()
	return out.String(), err
}
