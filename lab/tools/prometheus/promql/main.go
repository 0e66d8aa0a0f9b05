// SPDX-License-Identifier: Apache-2.0

// Command promql answers queries with Prometheus's own storage and query engine,
// about the metrics of a server.
//
// Its arguments are files in Prometheus's text format, scraped half a minute apart.
// It reads queries from standard input, one per line, and writes one line for each:
// the number of series in the answer, or an error. It exits with status 1 if it
// cannot read the files.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/tsdb"
)

// interval is the time between two scrapes.
const interval = 30 * time.Second

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "promql:", err)
		os.Exit(1)
	}
}

func run(scrapes []string, queries io.Reader, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "promql-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	db, err := tsdb.Open(dir, nil, nil, tsdb.DefaultOptions(), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	now := time.Now()
	for i, path := range scrapes {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := store(db, text, now.Add(time.Duration(i+1-len(scrapes))*interval)); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute, Parser: parser.NewParser(parser.Options{})})
	lines := bufio.NewScanner(queries)
	for lines.Scan() {
		series, err := ask(engine, db, lines.Text(), now)
		if err != nil {
			fmt.Fprintf(out, "error: %v\n", err)
			continue
		}
		fmt.Fprintln(out, series)
	}
	return lines.Err()
}

// store stores one scrape. Like Prometheus, it adds labels for the server.
func store(db *tsdb.DB, text []byte, at time.Time) error {
	samples, err := textparse.New(text, "text/plain", labels.NewSymbolTable(), textparse.ParserOptions{})
	if err != nil {
		return err
	}
	app := db.Appender(context.Background())
	for {
		entry, err := samples.Next()
		if errors.Is(err, io.EOF) {
			return app.Commit()
		}
		if err != nil {
			return errors.Join(err, app.Rollback())
		}
		if entry != textparse.EntrySeries {
			continue
		}
		var series labels.Labels
		samples.Labels(&series)
		_, _, value := samples.Series()
		series = labels.NewBuilder(series).Set("instance", "lab").Set("job", "caddy").Labels()
		if _, err := app.Append(0, series, at.UnixMilli(), value); err != nil {
			return errors.Join(err, app.Rollback())
		}
	}
}

// ask returns the number of series in the answer to a query.
func ask(engine *promql.Engine, db *tsdb.DB, query string, at time.Time) (series int, err error) {
	ctx := context.Background()
	q, err := engine.NewInstantQuery(ctx, db, nil, query, at)
	if err != nil {
		return 0, err
	}
	defer q.Close()
	answer := q.Exec(ctx)
	if answer.Err != nil {
		return 0, answer.Err
	}
	vector, err := answer.Vector()
	if err != nil {
		return 0, fmt.Errorf("the answer has type %s: %w", answer.Value.Type(), err)
	}
	return len(vector), nil
}
